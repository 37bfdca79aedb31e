"""The harness's own command, where the model ``beacon`` is known: ``python -m beacon.evaluation.harness``."""

from beacon.evaluation.harness.language_model import beacon_lm


def main() -> None:
    """Register ``beacon`` and hand over to the harness."""
    beacon_lm()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

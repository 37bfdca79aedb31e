"""The small trained model that ships with the package."""

from __future__ import annotations

from pathlib import Path


def default_model() -> Path:
    """Folder of the shipped model: a Hugging Face model and tokenizer, and its beacon adapter in ``adapter/``.

    Load it with ``beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")``.

    Raises:
        FileNotFoundError: The installation came without it.
    """
    folder = Path(__file__).parent / "default_model"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"the shipped model is missing from {folder}; reinstall activation-beacon, or train it with the commands "
            "in examples/reproduce_100x/README.md."
        )
    return folder

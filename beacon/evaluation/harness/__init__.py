"""Standard tasks: a wrapped model in EleutherAI's lm-evaluation-harness (extra ``[eval]``).

In a program, on local copies of the data or on the hub's::

    from beacon.evaluation.harness import evaluate_tasks

    report = evaluate_tasks(model, tokenizer, ["ruler", "longbench", "mmlu"], data="data", lengths=[4096, 32768])

The harness's own calls and command take the model too::

    from beacon.evaluation.harness import BeaconLM

    lm_eval.simple_evaluate(model=BeaconLM(model, tokenizer=tokenizer, ratios=8), tasks=["winogrande"])

    python -m beacon.evaluation.harness --model beacon --model_args pretrained=BASE,adapter=ADAPTER --tasks winogrande

``BeaconLM`` is made when it is first asked for, so this package imports without the harness. Suites, data and what is
measured how: docs/evaluation.md.
"""

from typing import TYPE_CHECKING, Any

from beacon.evaluation.harness.language_model import beacon_lm
from beacon.evaluation.harness.running import evaluate_tasks
from beacon.evaluation.harness.tasks import SUITES, Suite

if TYPE_CHECKING:
    BeaconLM: Any

__all__ = ["SUITES", "BeaconLM", "Suite", "evaluate_tasks"]


def __getattr__(name: str) -> Any:
    if name == "BeaconLM":
        return beacon_lm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

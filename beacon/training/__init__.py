"""Train beacons on short sequences: ``beacon train RECIPE.yaml``, or :class:`BeaconTrainer` in a program of yours.

Names are imported when first used: counting FLOPs (:mod:`beacon.training.flops`) needs no Trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beacon.training.collator import BeaconCollator
    from beacon.training.data import DataConfig, SourceConfig, build_dataset
    from beacon.training.evaluation import EvaluationConfig, LongContextEvaluation
    from beacon.training.models import ModelConfig
    from beacon.training.objectives import ObjectiveConfig
    from beacon.training.ratios import Draw, RatioConfig, Stage
    from beacon.training.recipe import Recipe
    from beacon.training.run import train
    from beacon.training.trainer import BeaconTrainer, BeaconTraining

_HOMES = {
    "collator": ("BeaconCollator",),
    "data": ("DataConfig", "SourceConfig", "build_dataset"),
    "evaluation": ("EvaluationConfig", "LongContextEvaluation"),
    "models": ("ModelConfig",),
    "objectives": ("ObjectiveConfig",),
    "ratios": ("Draw", "RatioConfig", "Stage"),
    "recipe": ("Recipe",),
    "run": ("train",),
    "trainer": ("BeaconTrainer", "BeaconTraining"),
}

__all__ = [
    "BeaconCollator",
    "BeaconTrainer",
    "BeaconTraining",
    "DataConfig",
    "Draw",
    "EvaluationConfig",
    "LongContextEvaluation",
    "ModelConfig",
    "ObjectiveConfig",
    "RatioConfig",
    "Recipe",
    "SourceConfig",
    "Stage",
    "build_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"beacon.training.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'beacon.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A training run on one page: a YAML file with a section per concern, and ``--section.field value`` over it."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from beacon.config import BeaconConfig
from beacon.training.data import DataConfig
from beacon.training.evaluation import EvaluationConfig
from beacon.training.models import ModelConfig
from beacon.training.objectives import ObjectiveConfig
from beacon.training.ratios import RatioConfig

PRESETS = {"paper": BeaconConfig.paper, "iclr2025": BeaconConfig.iclr2025}
SECTIONS = ("model", "beacon", "ratios", "objective", "data", "validation", "evaluation", "training")
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "gradient_checkpointing": True,
    "length_column_name": "windows",
    "per_device_eval_batch_size": 1,
    "disable_tqdm": False,
}


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 has it: 5e-5 is a number, and no, yes, on and off are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads it from the class)
        first: [(tag, words) for tag, words in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false|True|False|TRUE|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does, each section validated by the component that reads it.

    Args:
        name: Of the file, without suffix.
        model: Base and dtypes.
        beacon: How the model reads, and reads after the training: saved with the adapter.
        ratios: Ratios while training.
        objective: Additional losses.
        data: What is trained on.
        validation: Texts whose loss is taken at every evaluation; None for none.
        evaluation: Long-context evaluation; None for none.
        training: Fields of transformers' ``TrainingArguments``, and ``peak_tflops``.
        values: All sections as they were written.
    """

    name: str
    model: ModelConfig
    beacon: BeaconConfig
    ratios: RatioConfig
    objective: ObjectiveConfig
    data: DataConfig
    validation: DataConfig | None
    evaluation: EvaluationConfig | None
    training: dict[str, Any]
    values: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, options: Sequence[str] = ()) -> Recipe:
        """Read a YAML file and options over it.

        Args:
            path: The file.
            options: As on the command line: ``--training.max_steps 100`` or ``--training.max_steps=100``; values are
                YAML.

        Raises:
            FileNotFoundError: No such file.
            TypeError: A value has the wrong type.
            ValueError: No YAML, unknown sections or fields, values that are not allowed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such recipe: {path}; examples/recipes/ has some to begin with.")
        try:
            values = yaml.load(path.read_text(), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise ValueError(f"{path} must be YAML, got something else ({' '.join(str(err).split())}).") from err
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold sections {', '.join(SECTIONS)}, got {type(values).__name__}.")
        return cls.parse(_overlaid(values, options), path.stem)

    @classmethod
    def parse(cls, values: Mapping[str, Any], name: str = "run") -> Recipe:
        """Build a recipe from its sections.

        Raises:
            TypeError: As :meth:`load`.
            ValueError: As :meth:`load`.
        """
        _known("a recipe", values, SECTIONS)
        sections = {key: _section(key, values.get(key)) for key in SECTIONS}
        for key in ("model", "data"):
            if not sections[key]:
                raise ValueError(f"a recipe must have a section {key}, got none; see examples/recipes/.")
        beacon = _beacon(sections["beacon"])
        recipe = cls(
            name=name,
            model=_built(ModelConfig, "model", sections["model"]),
            beacon=beacon,
            ratios=_built(RatioConfig, "ratios", sections["ratios"]),
            objective=_built(ObjectiveConfig, "objective", sections["objective"]),
            data=_built(DataConfig, "data", sections["data"]),
            validation=_built(DataConfig, "validation", sections["validation"]) if sections["validation"] else None,
            evaluation=_built(EvaluationConfig, "evaluation", sections["evaluation"])
            if sections["evaluation"]
            else None,
            training=sections["training"],
            values={key: sections[key] for key in SECTIONS if sections[key]},
        )
        recipe.ratios.check(beacon)
        extra = recipe.objective.distillation or recipe.objective.reconstruction
        if extra and recipe.data.packing:
            raise NotImplementedError(
                "objective.distillation and objective.reconstruction need a row per document, got data.packing: true; "
                "set it to false."
            )
        return recipe

    @property
    def fingerprints(self) -> dict[str, str]:
        """Eight hexadecimal digits of every section that decides what a step reads and computes."""
        kept = {key: dict(self.values.get(key, {})) for key in ("model", "beacon", "ratios", "objective", "data")}
        for key, free in (("data", "num_proc"), ("beacon", "attention_path"), ("model", "saved_dtype")):
            kept[key].pop(free, None)
        return {
            f"section {key}": hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]
            for key, values in kept.items()
        }

    def to_yaml(self) -> str:
        """The sections as one file, options included."""
        return yaml.safe_dump(json.loads(json.dumps(self.values, default=str)), sort_keys=False)

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``TrainingArguments``: the section's over our defaults.

        Raises:
            ValueError: A field that ``TrainingArguments`` does not have.
        """
        from transformers import TrainingArguments

        allowed = {field.name for field in fields(TrainingArguments)}
        given = {key: value for key, value in self.training.items() if key != "peak_tflops"}
        chosen = spelled({"output_dir": f"runs/{self.name}", **DEFAULTS, **given})
        _known("training", chosen, [*sorted(allowed), "gradient_checkpointing", "peak_tflops"])
        return chosen


def spelled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``TrainingArguments`` by the names of the installed release.

    Newer ones call ``gradient_checkpointing`` ``activation_checkpointing``; recipes keep the name both understand.
    """
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    if "activation_checkpointing" not in names:
        return arguments
    return {key.replace("gradient_checkpointing", "activation_checkpointing"): v for key, v in arguments.items()}


def _beacon(values: dict[str, Any]) -> BeaconConfig:
    preset = values.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"beacon: preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != "preset"
    }
    _known("beacon", given, ["preset", *(field.name for field in fields(BeaconConfig))])
    return BeaconConfig(**given) if preset is None else PRESETS[preset](**given)


def _built(cls: Any, section: str, values: dict[str, Any]) -> Any:
    _known(section, values, [field.name for field in fields(cls)])
    try:
        return cls(**values)
    except TypeError as err:
        if "missing" in str(err):
            raise ValueError(f"{section}: {str(err).partition(') ')[2] or err}") from err
        raise


def _section(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"section {name} must hold fields, got {value!r}.")
    return dict(value)


def _known(what: str, values: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"it may have {', '.join(sorted(allowed)[:12])} ..."
            )
            raise ValueError(f"{what} has no field {key!r}; {hint}")


def _overlaid(values: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """The sections with ``--section.field value`` put over them."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    left = list(options)
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        section, dot, field = name.partition(".")
        if not word.startswith("--") or not dot or section not in SECTIONS:
            raise ValueError(
                f"options must read --section.field value with a section of {', '.join(SECTIONS)}, got {word!r}; for "
                "example --training.max_steps 100."
            )
        if not equals:
            if not left:
                raise ValueError(f"{word} must be followed by a value, got nothing.")
            text = left.pop(0)
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as err:
            raise ValueError(f"the value of --{name} must be YAML, got {text!r}.") from err
        place = merged[section] = dict(merged.get(section) or {})
        *outer, last = field.split(".")
        for key in outer:
            place[key] = dict(place.get(key) or {})
            place = place[key]
        place[last] = value
    return merged

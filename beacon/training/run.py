"""A training run from its recipe: data, model, trainer, and what is left behind."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beacon.training.collator import BeaconCollator
from beacon.training.data import Report, build_dataset
from beacon.training.evaluation import LongContextEvaluation
from beacon.training.models import load_model, load_tokenizer, saved_dtype
from beacon.training.recipe import Recipe
from beacon.training.trainer import BeaconTrainer


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Args:
        folder: The adapter, its checkpoints, records and figures.
        step: Steps done, those of earlier starts included.
        loss: Mean loss of this start's steps.
        seconds: Of this start.
        report: What became of the documents.
        first: Whether this is the process that writes.
    """

    folder: Path
    step: int
    loss: float
    seconds: float
    report: Report
    first: bool


def train(recipe: Recipe, resume: str | Path | bool = False) -> Outcome:
    """Train an adapter; started by ``torchrun`` or ``accelerate launch``, all processes call.

    Args:
        recipe: What to do.
        resume: A checkpoint to go on from; True takes the last complete one of the recipe's output folder.

    Returns:
        What there is to see.

    Raises:
        FileExistsError: The output folder holds checkpoints and none is resumed.
        FloatingPointError: A loss was no number.
        ImportError: A package that the recipe needs is missing.
        MemoryError: The device is full.
        OSError: A checkpoint could not be written.
        ValueError: The recipe, its data or the checkpoint cannot be used.
    """
    begin = time.perf_counter()
    args = _arguments(recipe)
    if (recipe.validation or recipe.evaluation) and str(
        getattr(args.eval_strategy, "value", args.eval_strategy)
    ) == "no":
        raise ValueError(
            "sections validation and evaluation need training.eval_strategy, got no; set it to steps (and eval_steps)."
        )
    tokenizer = load_tokenizer(recipe.model)
    sizes = {"window": recipe.beacon.window, "stride": recipe.beacon.step}
    with args.main_process_first(desc="reading the data"):
        dataset, report = build_dataset(recipe.data, tokenizer, **sizes)
        validation = None if recipe.validation is None else build_dataset(recipe.validation, tokenizer, **sizes)[0]
    with read_whole(args):
        model = load_model(recipe.model, recipe.beacon)
    evaluation = None if recipe.evaluation is None else LongContextEvaluation(recipe.evaluation, tokenizer)
    trainer = BeaconTrainer(
        model,
        args,
        ratios=recipe.ratios,
        objective=recipe.objective,
        evaluation=evaluation,
        peak_tflops=recipe.training.get("peak_tflops"),
        facts=recipe.fingerprints,
        saved_dtype=saved_dtype(recipe.model, model),
        data_collator=BeaconCollator(tokenizer),
        train_dataset=dataset,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    folder = Path(args.output_dir)
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    first = bool(trainer.is_world_process_zero())
    if first:
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return Outcome(folder, result.global_step, result.training_loss, time.perf_counter() - begin, report, first)


@contextmanager
def read_whole(args: Any) -> Iterator[None]:
    """Let every process read the base whole under ZeRO-3: beacons begin as copies, and the engine spreads all later."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def leave_group() -> None:
    """End what is distributed, all processes together.

    gloo's thread may still be waiting for the interpreter to let go of a tensor; whoever destroys the group first
    waits for that thread, holding the interpreter, for good. A moment in which nobody holds it prevents that.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def _arguments(recipe: Recipe) -> Any:
    """The recipe's ``TrainingArguments``; they begin what is distributed."""
    from transformers import TrainingArguments

    chosen = recipe.arguments()
    wanted = chosen["report_to"] if isinstance(chosen["report_to"], list) else [chosen["report_to"]]
    for name in ("tensorboard", "wandb"):
        if name in wanted and importlib.util.find_spec(name) is None:
            raise ImportError(
                f"training.report_to names {name}, which is not installed; pip install {name}, or set it to none."
            )
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("datasets") is None:
        raise ImportError("training needs accelerate and datasets; pip install 'activation-beacon[train]'.")
    try:
        return TrainingArguments(**chosen)
    except TypeError as err:
        raise TypeError(f"training: {err}") from err

"""``beacon train``: a recipe, options over it, and what came of it."""

from __future__ import annotations

import argparse
import logging
import os

import transformers
from rich.console import Console

from beacon.training import Recipe, train
from beacon.training.run import leave_group


def run(args: argparse.Namespace, console: Console) -> None:
    """Train, or with ``--check`` only say what would be done."""
    if not args.debug:
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if os.environ.get("RANK", "0") == "0":  # one process tells what all of them do
            logging.getLogger("beacon").setLevel(logging.INFO)
    options = list(args.options)
    if args.wandb:
        options += ["--training.report_to", "[tensorboard, wandb]"]
    recipe = Recipe.load(args.recipe, options)
    recipe.arguments()
    if args.check:
        console.print(recipe.to_yaml(), markup=False, highlight=False)
        return
    outcome = train(recipe, args.resume)
    if outcome.first:
        console.print(
            f"{outcome.step:,} steps, mean loss {outcome.loss:.4f}, {outcome.seconds:.0f} s. Adapter: {outcome.folder}",
            soft_wrap=True,
        )
        console.print(
            f"Next: beacon ask {recipe.model.name} --adapter {outcome.folder} --context FILE --question '...'",
            soft_wrap=True,
        )
    leave_group()

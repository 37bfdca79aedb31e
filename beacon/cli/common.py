"""What several subcommands do: load a model, show tables and bars, keep other libraries quiet."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from beacon.weights import CONFIG_FILE

SHORT = 12  # characters of a figure


def find_source(model: str) -> str | Path:
    """Folder of the shipped model, or the folder or hub id that was named."""
    if model == "default":
        return beacon.default_model()
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise FileNotFoundError(f"no such folder: {model}; a hub id has the form owner/name.")
    return str(Path(model).expanduser()) if model.startswith("~") else model


def check_device(name: str) -> None:
    """Refuse a device that PyTorch does not find here."""
    if name == "meta":
        raise ValueError("device must be one that computes, got 'meta'; pass --device cpu.")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as err:  # PyTorch built without CUDA asserts
        raise ValueError(
            f"device must be one that PyTorch finds here, got {name!r}; pass --device cpu ({err})."
        ) from err


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The wrapped model that ``--model`` (or an argument of that name) and ``--adapter`` name, and its tokenizer."""
    folder = find_source(args.model)
    adapter = args.adapter or _own_adapter(args.model, Path(folder))
    kinds = {"auto": "float32" if args.device == "cpu" else "auto"}
    name = kinds.get(args.dtype, args.dtype)
    dtype = name if name == "auto" else getattr(torch, name)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        model = beacon.load_adapter(model.to(args.device).eval(), adapter)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (SafetensorError, StrictDataclassError, JSONDecodeError) as err:
        raise ValueError(f"{folder} has a damaged file ({err}); save or download it again.") from err


def _own_adapter(model: str, folder: Path) -> Path:
    """The beacons that come with a model: those of the shipped one, or of a wrapped model that was saved."""
    if model == "default":
        return folder / "adapter"
    if (folder / CONFIG_FILE).is_file():
        return folder
    raise ValueError(
        "--adapter must name the beacons of this model, got none; only `default`, and a wrapped model that was saved, "
        "has its own."
    )


def show_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table; rows of beacons stand out."""
    table = Table(header_style="bold")
    for number, name in enumerate(head):
        short = max(len(row[number]) for row in [head, *rows]) <= SHORT  # figures stay whole, words may fold
        table.add_column(
            name, justify="left" if number == 0 else "right", no_wrap=number > 0 and short, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(escape, row), style="bold orange3" if row[0].startswith("beacon") else None)
    if title is not None:
        console.print(f"\n[bold]{escape(title)}[/]")
    console.print(table)


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Progress bars that are gone when all is done."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        yield bars


@contextmanager
def no_inner_bars() -> Iterator[None]:
    """Where libraries show no bars of their own (tqdm's), which would tear ours apart."""
    begin = tqdm.__init__

    def hidden(bar: Any, *args: Any, **settings: Any) -> None:
        begin(bar, *args, **{**settings, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin


def quiet(args: argparse.Namespace) -> None:
    """Keep other libraries from telling of themselves, but for ``--debug``."""
    if not args.debug:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt to reach the hub

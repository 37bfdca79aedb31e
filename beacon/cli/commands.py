"""What the subcommands do."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer

import beacon
from beacon.cli.common import check_device, find_source, load_model, progress_bars, quiet, show_table
from beacon.config import PROJECTIONS, check_ratio
from beacon.demo import Settings, load_default, write_report
from beacon.demo import run as run_demo
from beacon.demo.report import tables
from beacon.evaluation import full_cache_bytes, read_file
from beacon.families import FAMILIES, family_of, trained_context
from beacon.weights import beacon_parameters
from beacon.wrapping import new_parameter_shapes

RATIOS = (2, 8, 32, 128)


def demo(args: argparse.Namespace, console: Console) -> None:
    """``beacon demo``."""
    quiet(args)
    check_device(args.device)
    chosen: dict[str, Any] = {"length": args.length, "ratio": args.ratio, "file": args.file}
    if args.quick:
        chosen |= {"length": min(args.length, 1024), "texts": 1, "targets": 64, "depths": (0.2, 0.8)}
    settings = Settings(**chosen)
    _check_output(args.output)
    with console.status("loading"):
        model, tokenizer = load_default(args.device, args.model)
    config = model.beacon_config
    source = str(args.file) if args.file else "the machine's own Python standard library"
    own = sum(p.numel() for p in beacon_parameters(model).values())
    base = sum(p.numel() for p in model.parameters()) - own
    console.print(
        f"A Llama of {base / 1e6:.1f}M parameters with {own / 1e6:.1f}M of beacons, native context "
        f"{model.beacon_wrapping.native_context} tokens, reads {source} in windows of {config.window}."
    )
    with progress_bars(console) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        result = run_demo(model, tokenizer, settings, advance)
    for table in tables(result):
        show_table(console, *table)
    console.print(
        f"texts: {', '.join(name + (' (held out)' if held else '') for name, held in result.texts)}", style="dim"
    )
    for file in write_report(result, args.output):
        console.print(f"wrote {file}", soft_wrap=True)
    console.print(f"{result.seconds:.0f} s. Next: beacon ask default --context FILE --question '# the pass key is '")


def info(args: argparse.Namespace, console: Console) -> None:
    """``beacon info``."""
    quiet(args)
    if min(args.lengths) < 1:
        raise ValueError(f"--lengths must be numbers of tokens, got {min(args.lengths)}; pass for example 32768.")
    with console.status("loading the configuration"):
        config = AutoConfig.from_pretrained(find_source(args.model), trust_remote_code=False)
    family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    base = sum(p.numel() for p in model.parameters())
    native = trained_context(config)
    show_table(
        console,
        ["model", str(args.model)],
        [
            ["model type", f"{config.model_type} (supported: {', '.join(FAMILIES)})"],
            ["parameters", f"{base / 1e6:,.1f}M"],
            ["native context", f"{native:,} tokens"],
        ],
    )
    rows = []
    for chosen in (PROJECTIONS, PROJECTIONS[:3]):
        window = min(1024, native)
        own = beacon.BeaconConfig(window=window, ratios=(window,), projections=chosen)
        added = sum(torch.Size(shape).numel() for shape in new_parameter_shapes(model, own).values())
        rows.append(
            [" ".join(chosen), f"{added / 1e6:,.1f}M", f"{100 * added / base:.0f}%", f"{added * 2 / 1e6:,.0f} MB"]
        )
    show_table(console, ["wrapping adds projections", "parameters", "of the base", "in bfloat16"], rows)
    window = min(1024, native)
    head = ["cache (bfloat16) at tokens", *(f"{length:,}" for length in args.lengths)]
    rows = [["full attention", *(_size(full_cache_bytes(config, length, 2)) for length in args.lengths)]]
    for ratio in RATIOS:
        held = [min(length, max(length - window, 0) // ratio + window) for length in args.lengths]
        rows.append([f"ratio {ratio}", *(_size(full_cache_bytes(config, entries, 2)) for entries in held)])
    show_table(console, head, rows)
    console.print(f"(beacons, and a last window of {window:,} raw tokens)", style="dim")


def ask(args: argparse.Namespace, console: Console) -> None:
    """``beacon ask``."""
    quiet(args)
    check_device(args.device)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}; pass for example 64.")
    if args.cache is not None and args.cache.is_dir():
        raise IsADirectoryError(f"--cache must name a file, got the folder {args.cache}; name one in it.")
    kept = args.cache is not None and args.cache.exists()
    if args.context is None and not kept:
        where = "no --cache" if args.cache is None else f"no file {args.cache}"
        raise ValueError(f"--context must name a file to read, or --cache one that was read before; got {where}.")
    if kept and (args.context is not None or args.ratio is not None):
        raise ValueError(f"--cache {args.cache} is there already: leave --context and --ratio out, or name another.")
    if args.cache is not None and not kept:
        _check_writable(args.cache)
    text = "" if kept else read_file(args.context)
    with console.status(f"loading {args.model}"):
        model, tokenizer = load_model(args)
    if args.ratio is not None:
        check_ratio(args.ratio, model.beacon_config.step)
    ids, question = _prompt(tokenizer, text, args.question)
    question = question.to(model.device)
    cache, reading = (
        (beacon.load_cache(model, args.cache), None) if kept else _read(args, console, model, ids, question)
    )
    start = time.perf_counter()
    out = model.generate(
        question,
        attention_mask=question.new_ones(1, cache.get_seq_length() + question.shape[1]),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    answering = time.perf_counter() - start
    stats = cache.stats()[0]
    speed = f"{ids.shape[1] / reading:,.0f} per second" if reading else f"kept in {args.cache}"
    show_table(
        console,
        ["statistics", ""],
        [
            ["tokens read", f"{stats['text_tokens']:,} ({speed})"],
            ["tokens answered", f"{out.shape[1] - question.shape[1]:,} in {answering:.1f} s"],
            ["entries kept", f"{stats['sinks'] + stats['beacons'] + stats['raw']:,} ({stats['beacons']:,} beacons)"],
            ["effective ratio", f"{stats['effective_ratio']:.1f}"],
            ["cache", _size(stats["bytes"])],
            ["attention path", stats["attention_path"]],
        ],
    )


def _read(
    args: argparse.Namespace, console: Console, model: Any, ids: torch.Tensor, question: torch.Tensor
) -> tuple[beacon.BeaconCache, float]:
    """What is read of a text, and the seconds it took; kept in a file where one is named."""
    start = time.perf_counter()
    with progress_bars(console) as bars:
        task = bars.add_task("reading", total=ids.shape[1])
        cache = model.compress(
            ids.to(model.device),
            ratios=args.ratio,
            expected_length=ids.shape[1] + question.shape[1] + args.max_new_tokens,
            progress=lambda done, total: bars.update(task, completed=done),
        )
    seconds = time.perf_counter() - start
    if args.cache is not None:
        beacon.save_cache(cache, model, args.cache)
    return cache, seconds


def _check_output(folder: Path) -> None:
    """Find out before minutes of measuring whether their results can be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("beacon demo draws a figure with matplotlib; pip install 'activation-beacon[demo]'.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output must be a folder, got the file {folder}; name another.")
    folder.mkdir(parents=True, exist_ok=True)


def _check_writable(file: Path) -> None:
    """Find out before minutes of reading whether what was read can be kept."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"--cache must lie in a folder that can be written, got {file}; name another.")


def _prompt(tokenizer: Any, text: str, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of what is condensed and of what is asked after it, through the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        mark = "\x00"
        text = text.replace(mark, "")
        message = [{"role": "user", "content": f"{text}{mark}{question}"}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = whole.split(mark)
        head = tokenizer(before, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        return head, tokenizer("\n\n" + after, add_special_tokens=False, return_tensors="pt").input_ids
    head = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return head, tokenizer("\n" + question, add_special_tokens=False, return_tensors="pt").input_ids


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"

"""From raw text to all figures: data, tokenizer, base, adapter, evaluation, plots; goes on where it was stopped.

    python examples/reproduce_100x/reproduce.py

Two CPU cores are enough; a GPU is used when there is one (`--scale gpu` for a larger model).
"""

import argparse
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import beacon
import perplexity
import recall
import short
from corpus import load_corpus
from cost import LENGTHS as COST_LENGTHS
from cost import measure_cost
from export import export
from plots import draw_all
from scales import SCALES, Scale
from train_adapter import train_adapter
from train_base import train_base

logger = logging.getLogger("reproduce")
STAGES = ("data", "base", "adapter", "evaluate", "cost", "plots")  # what is run by default, in this order


def evaluate(folder: Path, work: Path, results: Path, scale: Scale) -> None:
    """All figures of a model, each a JSON file that grows row by row.

    Args:
        folder: The model in bfloat16, as it is shipped, with ``adapter/``.
        work: Folder of build products, for the held-out packages.
        results: Where the figures go.
        scale: How many texts, how long.
    """
    tokenizer, _, held_out = load_corpus(work)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = beacon.load_adapter(base, folder / "adapter")
    short.measure(model, held_out, results, scale.texts)
    recall.measure_passkeys(model, tokenizer, held_out, results, scale.keys, scale.longest)
    perplexity.measure(model, held_out, results, scale.texts, scale.longest)
    recall.measure_needles(model, tokenizer, held_out, results, 3 * scale.keys, scale.longest)


def main() -> None:
    """Read the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/reproduce_100x"), help="folder of build products")
    parser.add_argument("--model", type=Path, help="folder of the finished model; default WORK/model")
    parser.add_argument("--results", type=Path, help="folder of figures; default WORK/results")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="sizes of the model and of its training")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which to run; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even with a GPU at hand")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    scale, model = SCALES[args.scale], args.model or args.work / "model"
    results = args.results or args.work / "results"
    if "data" in args.stages:
        load_corpus(args.work)
    if "base" in args.stages:
        train_base(args.work, scale, seed=args.seed, cpu=args.cpu)
    if "adapter" in args.stages:
        train_adapter(args.work, scale, seed=args.seed, cpu=args.cpu, rows=scale.rows)
        export(args.work, model)
    if "evaluate" in args.stages:
        evaluate(model, args.work, results, scale)
    if "cost" in args.stages:
        lengths = tuple(length for length in COST_LENGTHS if length <= scale.cost_up_to)
        measure_cost(model, results, lengths=lengths, threads=args.threads)
    if "plots" in args.stages:
        logger.info("figures and tables: %s", draw_all(results))


if __name__ == "__main__":
    main()

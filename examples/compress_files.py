"""Read many files once and keep what was read: a cache file each, to be asked by any later process.

    accelerate launch --num-processes 2 examples/compress_files.py caches/ default *.txt
    beacon ask default --cache caches/book.txt.safetensors --question "# the pass key is "

Every process takes a share of the files and reads a batch at once, whose windows share passes. Files whose cache is
there already are not read again; what cannot be read is named at the end and does not stop the others. Texts are read
as they are, without a chat template.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from beacon.evaluation import read_file


def main() -> None:
    """Read the command line, compress this process's share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the caches, FILE.safetensors for every file")
    parser.add_argument("model", help="folder, hub id, or default for the shipped model")
    parser.add_argument("files", type=Path, nargs="+", help="UTF-8 texts, of different names")
    parser.add_argument("--adapter", help="folder or hub id of the beacons (the shipped model has its own)")
    parser.add_argument("--ratio", type=int, help="raw tokens per beacon (default: the configured policy)")
    parser.add_argument("--batch", type=int, default=8, help="files that are read at once (default 8)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even with GPUs at hand")
    args = parser.parse_args()
    places = {args.output / f"{file.name}.safetensors": file for file in args.files}
    if len(places) < len(args.files):
        raise SystemExit("files must have different names, for their caches lie in one folder; rename some.")
    state = PartialState(cpu=args.cpu)
    folder = beacon.default_model() if args.model == "default" else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if state.device.type == "cuda" else torch.float32)
    model = beacon.load_adapter(model.to(state.device).eval(), args.adapter or Path(folder) / "adapter")

    failed = []
    with state.split_between_processes(list(places)) as whole_share:
        share = [place for place in whole_share if not place.exists()]
        for first in range(0, len(share), args.batch):
            batch, documents = [], []
            for place in share[first : first + args.batch]:
                try:
                    ids = tokenizer(read_file(places[place]), verbose=False).input_ids
                except (OSError, ValueError) as err:
                    failed.append(f"{places[place]}: {err}")
                    continue
                batch.append(place)
                documents.append(ids)
            if not batch:
                continue
            cache = model.compress(documents, ratios=args.ratio)
            for row, place in enumerate(batch):
                beacon.save_cache(cache.select([row]), model, place)
                print(f"{places[place]}: {len(documents[row]):,} tokens, {place.stat().st_size:,} bytes", flush=True)
    state.wait_for_everyone()
    if failed:
        raise SystemExit("not read:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()

"""``python -m beacon.training RECIPE.yaml ...`` is ``beacon train``, for torchrun and accelerate launch."""

import sys

from beacon.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""``python -m beacon``: the command line."""

import sys

from beacon.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The command line ``beacon``: the only place that prints, configures logging and exits."""

from beacon.cli.main import main

__all__ = ["main"]

"""Gather entries from up to three sources, rotate keys, copy values, write both where they are read next."""

from beacon_kernels.rotate_commit.api import rotate_commit
from beacon_kernels.rotate_commit.gather import Gather, build_gather

__all__ = ["Gather", "build_gather", "rotate_commit"]

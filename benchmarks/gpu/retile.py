"""One entry of the tile table: read it, exchange it while the program runs, or for good in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from beacon_kernels.tiles import ARCHITECTURES, TABLES, Tile
from benchmarks.machine import KERNELS

SOURCE = KERNELS / "tiles.py"


@dataclass(frozen=True)
class Entry:
    """A tile of the table.

    Args:
        kernel: A key of ``TABLES``.
        head_dim: Channels per head.
        dtype: Name of a dtype; the table knows its size only.
        architecture: One of ``ARCHITECTURES``.
    """

    kernel: str
    head_dim: int
    dtype: str
    architecture: int

    def __str__(self) -> str:
        return f"{self.kernel}, head_dim {self.head_dim}, {self.dtype}, sm_{self.architecture}"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return torch.empty((), dtype=getattr(torch, self.dtype)).element_size()

    @property
    def op(self) -> str:
        """What runs it: ``forward``, ``backward`` or ``decode``."""
        return self.kernel.split("_")[0]

    @property
    def current(self) -> Tile:
        """What the table has."""
        return TABLES[self.kernel][self.head_dim, self.itemsize][ARCHITECTURES.index(self.architecture)]

    @contextmanager
    def holding(self, tile: Tile) -> Iterator[None]:
        """The table with another tile while it lasts."""
        before = self.current
        self._put(tile)
        try:
            yield
        finally:
            self._put(before)

    def write(self, tile: Tile, path: Path = SOURCE) -> None:
        """Put a tile into the table, and into its source for good."""
        path.write_text(retiled(path.read_text(encoding="utf-8"), self, tile), encoding="utf-8")
        self._put(tile)

    def _put(self, tile: Tile) -> None:
        key = self.head_dim, self.itemsize
        ampere, hopper = TABLES[self.kernel][key]
        TABLES[self.kernel][key] = (tile, hopper) if self.architecture == ARCHITECTURES[0] else (ampere, tile)


def retiled(source: str, entry: Entry, tile: Tile) -> str:
    """The source of ``tiles.py`` with another tile in one place.

    Nothing but that tile changes: the other architecture's, comments and layout stay.

    Raises:
        ValueError: The table has no such entry, or is not written as literals any more.
    """
    value = _value(_table(ast.parse(source), entry.kernel), entry)
    if not isinstance(value, ast.Tuple) or len(value.elts) != len(ARCHITECTURES):
        raise ValueError(f"an entry must be {len(ARCHITECTURES)} tiles, got {ast.unparse(value)}; write the table so.")
    old = value.elts[ARCHITECTURES.index(entry.architecture)]
    text = ast.get_source_segment(source, old)
    assert text is not None
    lines = source.splitlines(keepends=True)
    at = sum(map(len, lines[: old.lineno - 1])) + len(lines[old.lineno - 1].encode()[: old.col_offset].decode())
    return source[:at] + written(tile) + source[at + len(text) :]


def written(tile: Tile) -> str:
    """A tile as the table has it."""
    sizes = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages]
    return f"Tile({', '.join(map(str, sizes + [tile.programs_per_sm] * bool(tile.programs_per_sm)))})"


def _table(tree: ast.Module, kernel: str) -> ast.Dict:
    """The dictionary that ``TABLES`` names for a kernel."""
    dictionaries = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    tables = dictionaries.get("TABLES", ast.Dict([], []))
    for key, name in zip(tables.keys, tables.values, strict=True):
        if key is not None and ast.literal_eval(key) == kernel and isinstance(name, ast.Name):
            return dictionaries[name.id]
    raise ValueError(f"TABLES must name a dictionary for {kernel!r}, got none; write the table so.")


def _value(table: ast.Dict, entry: Entry) -> ast.expr:
    wanted = (entry.head_dim, entry.itemsize)
    for key, value in zip(table.keys, table.values, strict=True):
        if key is not None and ast.literal_eval(key) == wanted:
            return value
    raise ValueError(f"the table of {entry.kernel!r} must have an entry {wanted}, got none; write one first.")

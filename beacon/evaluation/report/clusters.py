"""Which items are not independent of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WITHIN = ("length", "depth", "turn", "asked")  # keys of places: items that differ in nothing else have a text in common


def cluster(name: str, place: Mapping[str, Any]) -> str:
    """What names the text that an item has in common with others: a document, a stretch of text, a dialogue.

    It is the item's name without the parts that only say where in the cluster it belongs: ``book, document 3`` of
    ``book, document 3, length 4096``. An item whose name has no other parts is a cluster of its own.

    Args:
        name: The item's, parts divided by commas.
        place: Its place.
    """
    inner = {f"{key} {place[key]}" for key in WITHIN if key in place}
    kept = [part for part in name.split(", ") if part not in inner]
    return ", ".join(kept) or name

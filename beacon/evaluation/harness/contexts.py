"""Which contexts are read together: those that begin alike read their beginning once, the others share passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

Tokens: TypeAlias = tuple[int, ...]

SHARE_FROM = 64  # tokens: a shorter beginning is not worth a call of its own


@dataclass(frozen=True)
class Family:
    """Contexts with a beginning in common.

    Args:
        prefix: Tokens that all begin with and that are read once; less than any of them has. 0: nothing in common.
        contexts: Token ids of each, the beginning included.
    """

    prefix: int
    contexts: tuple[Tokens, ...]


def families(contexts: Iterable[Tokens]) -> list[Family]:
    """Sort contexts by what they have in common.

    Questions about one book, and questions after the same solved examples, share most of what is read. A beginning
    counts as shared where it makes up half of the longest context of the family.

    Args:
        contexts: Token ids of each, at least one; repeated ones count once.

    Returns:
        The families, and last the contexts that belong to none, longest first (what does not fit into memory shows at
        once).
    """
    found: list[Family] = []
    alone: list[Tokens] = []
    run: list[Tokens] = []
    shared = 0

    def close() -> None:
        if len(run) > 1:
            found.append(Family(shared, tuple(run)))
        else:
            alone.extend(run)

    for context in sorted(set(contexts)):
        if run:
            common = min(shared, common_prefix(run[-1], context))
            longest = max(len(context), *map(len, run))
            if common >= max(SHARE_FROM, longest / 2):
                run.append(context)
                shared = common
                continue
            close()
        run, shared = [context], len(context) - 1
    close()
    if alone:
        found.append(Family(0, tuple(sorted(alone, key=len, reverse=True))))
    return found


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two contexts begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

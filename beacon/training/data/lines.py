"""Lines of JSON."""

from __future__ import annotations

import json
from typing import Any


class BrokenLineError(ValueError):
    """A line is no JSON object."""


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        BrokenLineError: It holds none; the message says why.
    """
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError as err:
        raise BrokenLineError("nested too deeply") from err
    except ValueError as err:  # of UTF-8 too
        raise BrokenLineError(str(err)) from err
    if not isinstance(row, dict):
        raise BrokenLineError(f"a {type(row).__name__}, no object")
    return row

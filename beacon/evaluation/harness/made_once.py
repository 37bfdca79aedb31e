"""Documents that take long to make, made once: kept in the cache of `datasets`, for all methods, processes and runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beacon.weights import whole

FORMAT = 1  # raise it if the same key makes other documents
FOLDER = "activation-beacon"  # in the cache, which HF_DATASETS_CACHE moves


def made_once(key: Mapping[str, Any], make: Callable[[], list[dict[str, Any]]]) -> Any:
    """Documents as a `datasets` table, made by the first who asks; others wait for it.

    Args:
        key: All that they depend on; JSON values. The harness's version counts as well.
        make: Makes them.
    """
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]
    from filelock import FileLock

    folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    known = json.dumps([FORMAT, version("lm_eval"), dict(key)], sort_keys=True)
    file = folder / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.parquet"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            made = datasets.Dataset.from_list(make())
            with whole(file) as partial:
                pyarrow.parquet.write_table(made.data.table, partial, compression="zstd")
    return datasets.Dataset(pyarrow.parquet.read_table(file))

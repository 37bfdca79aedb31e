"""Activation Beacon: read far beyond a language model's context window, with its weights untouched.

See :func:`wrap` for the one call that matters. Source: arXiv 2401.03462.

Names are imported when first used: torch and transformers take seconds, which ``beacon --help`` need not wait for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beacon.assets import default_model
    from beacon.cache import BeaconCache
    from beacon.cache_files import load_cache, save_cache
    from beacon.config import BeaconConfig
    from beacon.identity import disabled
    from beacon.policies import RatioRequest
    from beacon.retrieval import BM25Scorer, retrieval_ratios
    from beacon.saving import load_adapter, load_reference, save_adapter
    from beacon.wrapping import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "BM25Scorer",
    "BeaconCache",
    "BeaconConfig",
    "RatioRequest",
    "__version__",
    "default_model",
    "disabled",
    "load_adapter",
    "load_cache",
    "load_reference",
    "retrieval_ratios",
    "save_adapter",
    "save_cache",
    "unwrap",
    "wrap",
]

_HOMES = {
    "assets": ("default_model",),
    "cache": ("BeaconCache",),
    "cache_files": ("load_cache", "save_cache"),
    "config": ("BeaconConfig",),
    "identity": ("disabled",),
    "policies": ("RatioRequest",),
    "retrieval": ("BM25Scorer", "retrieval_ratios"),
    "saving": ("load_adapter", "load_reference", "save_adapter"),
    "wrapping": ("unwrap", "wrap"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"beacon.{home}"), name)
            globals()[name] = value
            return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"beacon.{name}")
        except ModuleNotFoundError as err:
            if err.name != f"beacon.{name}":
                raise
    raise AttributeError(f"module 'beacon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

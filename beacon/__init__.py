"""Activation Beacon: read far beyond a language model's context window, with its weights untouched.

See :func:`wrap` for the one call that matters. Source: arXiv 2401.03462.
"""

from beacon.assets import default_model
from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.identity import disabled
from beacon.policies import RatioRequest, retrieval_ratios
from beacon.saving import load_adapter, load_reference, save_adapter
from beacon.wrapping import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "BeaconCache",
    "BeaconConfig",
    "RatioRequest",
    "__version__",
    "default_model",
    "disabled",
    "load_adapter",
    "load_reference",
    "retrieval_ratios",
    "save_adapter",
    "unwrap",
    "wrap",
]

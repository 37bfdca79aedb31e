"""A snapshot of the public API. A change here is a change for users: it needs a line in CHANGELOG.md."""

import inspect

import pytest

import beacon

PUBLIC = [
    "BeaconCache",
    "BeaconConfig",
    "__version__",
    "disabled",
    "load_adapter",
    "load_reference",
    "save_adapter",
    "unwrap",
    "wrap",
]
# Parameters with their kinds and defaults, without annotations.
SIGNATURES = {
    "disabled": "(model)",
    "load_adapter": "(model, path)",
    "load_reference": "(model, path)",
    "save_adapter": "(model, folder)",
    "unwrap": "(model)",
    "wrap": "(model, config)",
    "BeaconConfig": (
        "(*, window=1024, stride=None, ratios=(0, 2, 4, 8, 16, 32, 64, 128), ratio_policy='adaptive', reserve=1024, "
        "attention='step-expansion', placement='append', attend_memory=True, attend_beacons=False, sink=0, "
        "projections=('q', 'k', 'v', 'o'), native_context=None, seed=0, segment=None, attention_path='auto')"
    ),
    "BeaconConfig.paper": "(**overrides)",
    "BeaconConfig.iclr2025": "(**overrides)",
    "BeaconCache.fork": "(self)",
    "BeaconCache.stats": "(self)",
    "BeaconCache.to": "(self, device)",
}


def signature(name: str) -> str:
    obj = beacon
    for part in name.split("."):
        obj = getattr(obj, part)
    parameters = inspect.signature(obj).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def test_public_names():
    assert sorted(beacon.__all__) == PUBLIC
    missing = [name for name in beacon.__all__ if not hasattr(beacon, name)]
    assert not missing


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert signature(name) == SIGNATURES[name]


def test_every_public_function_has_a_snapshot_and_a_docstring():
    for name in beacon.__all__:
        obj = getattr(beacon, name)
        if inspect.isfunction(obj):
            assert name in SIGNATURES, f"add the signature of {name} to SIGNATURES"
        if callable(obj):
            assert inspect.getdoc(obj), f"{name} needs a docstring"

"""A snapshot of the public API. A change here is a change for users: it needs a line in CHANGELOG.md."""

import inspect

import pytest

import beacon

PUBLIC = [
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
# Parameters with their kinds and defaults, without annotations.
SIGNATURES = {
    "default_model": "()",
    "disabled": "(model)",
    "load_adapter": "(hf_model, folder_or_hub_id, **overrides)",
    "load_cache": "(model, path)",
    "load_reference": "(model, path)",
    "retrieval_ratios": (
        "(input_ids, query_ids, config, *, low=None, high=None, top=3, keep_first=0, expected_length=None, "
        "scorer=None, overlap=None)"
    ),
    "save_adapter": "(model, folder, dtype=None)",
    "save_cache": "(cache, model, path)",
    "unwrap": "(model)",
    "wrap": "(hf_model, config=None)",
    "BM25Scorer": "(*, ngrams=2, k1=1.5, b=0.75)",
    "BeaconConfig": (
        "(*, window=1024, stride=None, ratios=(0, 2, 4, 8, 16, 32, 64, 128), ratio_policy='adaptive', reserve=1024, "
        "attention='step-expansion', placement='append', attend_memory=True, attend_beacons=False, sink=0, "
        "projections=('q', 'k', 'v', 'o'), native_context=None, seed=0, segment=None, attention_path='auto', "
        "memory_dtype='auto', offload_memory=False)"
    ),
    "BeaconConfig.paper": "(**overrides)",
    "BeaconConfig.iclr2025": "(**overrides)",
    "BeaconCache.fork": "(self)",
    "BeaconCache.select": "(self, rows)",
    "BeaconCache.stats": "(self)",
    "BeaconCache.to": "(self, device)",
    "model.BeaconModel.forward": (
        "(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, "
        "labels=None, use_cache=None, logits_to_keep=0, ratios=None, expected_length=None, keep_first=None, "
        "keep_from=None, **kwargs)"
    ),
    "model.BeaconModel.compress": (
        "(self, input_ids, attention_mask=None, past_key_values=None, ratios=None, progress=None, "
        "expected_length=None, keep_first=None, keep_from=None)"
    ),
    "model.BeaconModel.generate": "(self, inputs=None, *args, **kwargs)",
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


def test_unknown_names_are_attribute_errors():
    assert not hasattr(beacon, "nothing_of_that_name")
    assert {"wrap", "BeaconConfig"} <= set(dir(beacon))


def test_every_public_function_has_a_snapshot_and_a_docstring():
    for name in beacon.__all__:
        obj = getattr(beacon, name)
        if inspect.isfunction(obj):
            assert name in SIGNATURES, f"add the signature of {name} to SIGNATURES"
        if callable(obj):
            assert inspect.getdoc(obj), f"{name} needs a docstring"

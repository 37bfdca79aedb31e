import pytest

from beacon.training.data import DataConfig, SourceConfig


def test_sources_come_from_yaml_as_strings_and_mappings():
    config = DataConfig.from_dict({"sources": ["a.jsonl", {"path": "b/*.txt", "weight": 2}], "max_length": 512})
    assert config.sources == (SourceConfig(path="a.jsonl"), SourceConfig(path="b/*.txt", weight=2))
    assert config.max_length == 512 and not config.weighted


def test_one_source_needs_no_list():
    one = SourceConfig(path="a.jsonl", weights_column="weight")
    assert (
        DataConfig(sources=one).sources == DataConfig(sources={"path": "a.jsonl", "weights_column": "weight"}).sources
    )
    assert DataConfig(sources=one).weighted
    assert DataConfig(sources="a.jsonl").sources == (SourceConfig(path="a.jsonl"),)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"sources": []}, ValueError, "at least one source"),
        ({}, ValueError, "must have sources"),
        ({"sources": 3}, TypeError, "list of sources"),
        ({"sources": [3]}, TypeError, "a path or a mapping"),
        ({"sources": [{"weight": 1}]}, ValueError, "must have a path, got only weight"),
        ({"sources": "a", "max_lenght": 1}, ValueError, "among sources, max_length, .* got max_lenght"),
        ({"sources": [{"path": "a", "wieght": 1}]}, ValueError, "among path, format, .* got wieght"),
        ({"sources": [{"path": ""}]}, TypeError, "path must be a string"),
        ({"sources": [{"path": "a", "format": "csv"}]}, ValueError, "format must be one of auto, text, .* got 'csv'"),
        ({"sources": [{"path": "a", "sample_by": "page"}]}, ValueError, "sample_by must be one of"),
        ({"sources": [{"path": "a", "weight": -1}]}, ValueError, "positive and finite, got -1 for 'a'"),
        ({"sources": [{"path": "a", "weight": 0}]}, ValueError, "positive and finite, got 0"),
        ({"sources": [{"path": "a", "weight": float("nan")}]}, ValueError, "positive and finite, got nan"),
        ({"sources": [{"path": "a", "weight": "much"}]}, TypeError, "weight must be a number"),
        ({"sources": "a", "max_length": 1}, ValueError, "max_length must be at least 2"),
        ({"sources": "a", "max_length": "8k"}, TypeError, "max_length must be an int"),
        ({"sources": "a", "max_length": 8, "min_length": 9}, ValueError, "min_length must not exceed max_length"),
        ({"sources": "a", "too_long": "cut"}, ValueError, "too_long must be one of"),
        ({"sources": "a", "broken_lines": "fix"}, ValueError, "broken_lines must be one of"),
        ({"sources": "a", "stopping": "never"}, ValueError, "stopping must be one of"),
        ({"sources": "a", "packing": 1}, TypeError, "packing must be a bool"),
        ({"sources": "a", "streaming": True, "num_proc": 2}, ValueError, "num_proc must be None for streaming"),
    ],
)
def test_bad_settings_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        DataConfig.from_dict(values)

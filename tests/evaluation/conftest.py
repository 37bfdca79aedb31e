import pytest
import torch

import beacon
from tests.evaluation.tiny import tiny_llama, word_tokenizer


@pytest.fixture
def model():
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8, ratio_policy="adaptive")
    return beacon.wrap(tiny_llama(), config)


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def ids():
    return torch.randint(0, 64, (150,), generator=torch.Generator().manual_seed(3))

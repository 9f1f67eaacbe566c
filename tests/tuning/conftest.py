"""The embedded model and noisy batches for it."""

import os

import pytest
from hypothesis import settings

from helpers import noisy, plain_logits
from vqfast import zoo

SOAK = "VQFAST_SOAK" in os.environ  # many more calls and examples, for `make soak`
settings.register_profile("short", max_examples=100, derandomize=True, deadline=None, database=None)
settings.register_profile("soak", max_examples=2000, deadline=None, database=None, print_blob=True)
settings.load_profile("soak" if SOAK else "short")


@pytest.fixture(scope="session")
def soak():
    return SOAK


@pytest.fixture(scope="module")
def loaded():
    model, processor = zoo.load()
    plain_logits(model, noisy(processor, zoo.questions("validation")[:1]))  # transformers adds its hooks on first use
    return model, processor


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def batch(loaded):
    """Five noisy validation digits, one question each: {name: [5, ...]}."""
    _, processor = loaded
    drawn = [zoo.questions("validation")[i] for i in (0, 4, 8, 9, 13)]
    return noisy(processor, drawn)


@pytest.fixture(scope="module")
def wide_batch(loaded):
    """Fifteen of them: enough for some to be tuned and some not."""
    return noisy(loaded[1], zoo.questions("validation")[::7][:15])

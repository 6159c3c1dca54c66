"""Models that the tests of this folder share."""

import pytest

from tests.posterior.examples import KINDS, batched, model_of


@pytest.fixture(scope="session")
def models():
    """One of each kind, trained for an epoch; the tests only read them."""
    return {k: model_of(batched(), **v).train(1, progress_bar=False) for k, v in KINDS.items()}


@pytest.fixture(scope="session")
def model(models):
    return models["zinb"]

"""Random configurations, a few of those that ``python -m tests.faults`` trains."""

import warnings
from collections import Counter

import pytest

from tests.examples import mostly_slow
from tests.faults.configurations import TRAINED, each


@pytest.mark.parametrize("n", mostly_slow([6, 50]))
def test_all_is_finite_or_refused(n):
    """As few refusals as not to miss what is to be seen."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each(n, seen.append)()
    kinds = Counter(outcome.partition(":")[0] for outcome in seen)
    assert kinds[TRAINED] >= n / 6, Counter(seen)

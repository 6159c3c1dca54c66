"""Which cells are compared with which, and in which batches they are decoded."""

import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import InputError
from pyro_scanvi.posterior.comparisons import Comparison, decoded_batches, find_comparisons


@pytest.fixture
def obs():
    table = {"kind": ["b", "a", "b", "c", "a"], "cluster": [0, 1, 1, 0, 0], "one": ["z"] * 5}
    return pd.DataFrame(table, index=list("vwxyz"))


def pairs(comparisons: list[Comparison]) -> list[tuple]:
    return [(c.names, c.cells1.tolist(), c.cells2.tolist()) for c in comparisons]


def test_groups_of_a_column(obs):
    rest = [("a", [1, 4], [0, 2, 3]), ("b", [0, 2], [1, 3, 4]), ("c", [3], [0, 1, 2, 4])]
    expected = [((name, "Rest"), one, two) for name, one, two in rest]
    assert pairs(find_comparisons(obs, "kind")) == expected
    obs["kind"] = pd.Categorical(obs["kind"], ["c", "b", "a", "empty"])
    assert pairs(find_comparisons(obs, "kind")) == expected[::-1]
    assert pairs(find_comparisons(obs, "kind", "b")) == [expected[1]]
    assert pairs(find_comparisons(obs, "kind", ["b", "a", "b"])) == [expected[1], expected[0]]
    assert pairs(find_comparisons(obs, "kind", "b", "c")) == [(("b", "c"), [0, 2], [3])]
    against = [(("c", "b"), [3], [0, 2]), (("a", "b"), [1, 4], [0, 2])]
    assert pairs(find_comparisons(obs, "kind", group2="b")) == against
    for name in (1, "1"):
        assert pairs(find_comparisons(obs, "cluster", name)) == [((1, "Rest"), [1, 2], [0, 3, 4])]


@pytest.mark.parametrize(
    "idx",
    [
        [0, -2],
        np.array([0, 3]),
        [True, False, False, True, False],
        "kind == 'c' or kind > 'a' and cluster == 0",
    ],
)
def test_cells_by_mask_positions_or_query(obs, idx):
    assert pairs(find_comparisons(obs, idx1=idx)) == [(None, [0, 3], [1, 2, 4])]
    assert pairs(find_comparisons(obs, idx1=[1], idx2=idx)) == [(None, [1], [0, 3])]


def test_batches_to_decode_in():
    names = np.array([3, 1, 2])  # of obs, not codes
    assert decoded_batches(names, False) == ([None], [None])
    assert decoded_batches(names, True) == ([0, 1, 2], [0, 1, 2])
    assert decoded_batches(names, True, [2, "3"], ["3", "2"]) == ([0, 2], [0, 2])
    assert decoded_batches(names, True, [3], [1, 2]) == ([0], [1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give groupby, a column of obs, or idx1"),
        ({"groupby": "knd"}, "'knd' is not a column of obs; did you mean 'kind'"),
        ({"groupby": "kind", "group1": "d"}, "'d' is not a group of obs.'kind'.; choose from a, b"),
        ({"groupby": "kind", "group1": ["a", "bb"]}, "'bb' is not a group.*did you mean 'b'"),
        ({"groupby": "kind", "group1": "a", "group2": "e"}, "'e' is not a group"),
        ({"groupby": "kind", "group1": ["a", "b"], "group2": "b"}, "both 'b'; compare two"),
        ({"groupby": "kind", "group1": []}, "group1 names no group"),
        ({"groupby": "one"}, "obs.'one'. has one group, 'z'"),
        ({"groupby": "holes"}, "no value in 2 cells"),
        ({"groupby": "kind", "idx1": [0]}, "groupby is given, but idx1 already says"),
        ({"group2": "a", "idx1": [0]}, "group2 is given, but idx1 already says"),
        ({"groupby": "kind", "idx2": [0]}, "idx2 is given, but there is no idx1"),
        ({"idx1": [0, 1], "idx2": [1, 2]}, "share 1 cells"),
        ({"idx1": [0, 1, 2, 3, 4]}, "idx1 selects all cells"),
        ({"idx1": []}, "idx1 selects no cell"),
        ({"idx1": "cluster == 7"}, "idx1 selects no cell"),
        ({"idx1": [0], "idx2": [False] * 5}, "idx2 selects no cell"),
        ({"idx1": [True, False]}, r"mask of shape .2,., expected .5,."),
        ({"idx1": [0], "idx2": [5]}, "positions from 5 to 5, but there are 5 cells"),
        ({"idx1": [-6]}, "positions from -6"),
        ({"idx1": [0.5]}, "idx1 holds float64"),
        ({"idx1": ["v", "w"]}, "idx1 holds <U1, expected a mask"),
        ({"idx1": "knd == 'a'"}, "is no query of obs.*knd"),
        ({"idx1": "kind =="}, "is no query of obs"),
    ],
)
def test_groups_that_are_refused(obs, arguments, message):
    obs["holes"] = ["a", None, "b", None, "a"]
    with pytest.raises(InputError, match=message):
        find_comparisons(obs, **arguments)

"""What an AnnData says of labels beside one exact label a cell: what is read, what is refused."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from pyro_scanvi import InputError
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.label_sources import LabelSources
from pyro_scanvi.data.minibatches import UNLABELED
from tests.examples import simulated

LABELS = ["B", "CD4", "CD8", "Unknown", "T", "lymphoid"]
T_CELLS = {"T": ["CD4", "CD8"]}
TREE = {"CD4": "T", "CD8": "T", "T": "lymphoid", "B": "lymphoid", "lymphoid": None}


def cells(labels, **columns) -> ad.AnnData:
    adata = simulated(len(labels), 6)
    adata.obs["cell_type"] = labels
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def set_up(adata, **given) -> Fields:
    return Fields.from_anndata(adata, "cell_type", "Unknown", sources=LabelSources.of(**given))


def chances(fields, adata) -> list[list[float]]:
    """p(what is known | label) of each cell."""
    return np.exp(fields.encode(adata).evidence.astype(float)).round(6).tolist()


# ---- sets and trees -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"label_sets": T_CELLS | {"lymphoid": ["T", "B"]}},  # a set in a set
        {"label_sets": {"lymphoid": ["T", "B"]}, "label_parents": {"CD4": "T", "CD8": "T"}},
        {"label_parents": TREE},
    ],
    ids=["sets", "both", "tree"],
)
def test_sets_and_trees(given):
    adata = cells(LABELS)
    fields = set_up(adata, **given)
    assert fields.classes.tolist() == ["B", "CD4", "CD8"]
    data = fields.encode(adata)
    assert data.label.tolist() == [0, 1, 2, *[UNLABELED] * 3]
    exact = np.eye(3).tolist()
    assert chances(fields, adata) == [*exact, [1, 1, 1], [0, 1, 1], [1, 1, 1]]


def test_a_set_of_one_label_is_that_label():
    adata = cells(["B", "T", "only"])
    fields = set_up(adata, label_sets={"only": ["B"]})
    assert fields.encode(adata).label.tolist() == [0, 1, 0]


def test_without_sources_nothing_is_added():
    adata = cells(["B", "T", "Unknown"])
    data = set_up(adata, labels=["NK"]).encode(adata)
    assert data.evidence is None and data.annotations is None


def test_named_labels_come_after_those_that_occur():
    """Also where no cell has them; numbers and names are one."""
    adata = cells([2, 10, 1, 2])
    with pytest.warns(UserWarning, match="does not occur"):
        fields = set_up(adata, labels=[7, "1", 2.0], label_sets={"low": [1, 3]})
    assert fields.classes.tolist() == ["1", "2", "10", "7", "3"]
    assert fields.encode(adata).label.tolist() == [1, 2, 0, 1]
    assert fields.sizes()["n_labels"] == 5


def test_labels_may_all_be_named():
    fields = set_up(cells(["Unknown"] * 4), labels=["B", "T"])
    assert fields.classes.tolist() == ["B", "T"]


# ---- a coarser column ---------------------------------------------------------------------------


def coarse(fine, column, **given):
    adata = cells(fine, coarse=column)
    fields = set_up(adata, coarse_labels_key="coarse", **given)
    return fields, chances(fields, adata)


def test_a_coarse_column_stands_for_the_labels_beside_it():
    fields, found = coarse(
        ["B", "CD4", "CD8", "Unknown", "Unknown", "Unknown"], ["B", "T", "T", "T", "B", None]
    )
    assert found == [*np.eye(3).tolist(), [0, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert fields.sources.coarse_members == (("B",), ("CD4", "CD8"))


def test_it_is_read_only_where_the_label_is_not_known():
    _, found = coarse(["B", "CD4", "CD8", "T"], ["B", "T", "T", "B"], label_sets=T_CELLS)
    assert found[3] == [0, 1, 1]


def test_coarse_names_may_be_those_of_labels():
    """ "T" is a label of a cell, and in the other column a T cell of any kind."""
    fields, found = coarse(["B", "T", "CD4", "Unknown"], ["B", "T", "T", "T"])
    assert fields.classes.tolist() == ["B", "CD4", "T"]
    assert found[3] == [0, 1, 1] and found[1] == [0, 0, 1]


def test_sets_say_what_a_coarse_label_is():
    """They come before the labels beside it, and serve where none stands beside it."""
    sets = {"T": ["CD4", "CD8", "gd"], "NK": ["NK bright", "NK dim"]}
    fields, found = coarse(
        ["B", "CD4", "Unknown", "Unknown"], ["B", "T", "T", "NK"], label_sets=sets
    )
    assert fields.classes.tolist() == ["B", "CD4", "CD8", "gd", "NK bright", "NK dim"]
    assert found[2:] == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_a_coarse_label_beside_none_is_refused():
    """Each of the two cures of the message works."""
    fine, column = ["B", "CD4", "Unknown"], ["B", "T", "NK"]
    with pytest.raises(InputError, match=r"label_sets=\{'NK': \[...\]\}.*labels=\['NK'\]"):
        coarse(fine, column)
    assert coarse(fine, column, label_sets={"NK": ["x", "y"]})[1][2] == [0, 0, 1, 1]
    assert coarse(fine, column, labels=["NK"])[1][2] == [0, 0, 1]


def test_new_cells_with_an_unseen_coarse_label_are_refused():
    fields, _ = coarse(["B", "CD4", "CD8", "Unknown"], ["B", "T", "T", "T"])
    with pytest.raises(InputError, match=r"obs\['coarse'\] has 1 labels .*NK"):
        fields.encode(cells(["B", "CD4", "CD8"], coarse=["B", "NK", "T"]))
    assert fields.encode(cells(["B", "Unknown", "CD8"])).label.tolist() == [0, -1, 2]


# ---- soft labels --------------------------------------------------------------------------------

SOFT = np.array([[2, 1, 1], [0, 1, 0], [np.nan] * 3, [0, 0, 0], [0.5, 0.5, 0], [1, 1, 8]])
GIVEN = ["Unknown", "Unknown", "Unknown", "Unknown", "CD4", "Unknown"]
EXPECTED = [[0.5, 0.25, 0.25], [0, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0], [0.1, 0.1, 0.8]]
FORMS = {
    "array": lambda _, v: v,
    "sparse": lambda _, v: csr_matrix(v),
    "DataFrame": lambda a, v: pd.DataFrame(v[:, ::-1], a.obs_names, ["CD8", "CD4", "B"]),
}


def softly(values, given=GIVEN, labels=("B", "CD4", "CD8"), **more):
    adata = cells(given)
    adata.obsm["soft"] = values(adata) if callable(values) else values
    return adata, set_up(adata, labels=labels, soft_labels_key="soft", **more)


@pytest.mark.parametrize("form", FORMS)
def test_soft_labels(form):
    """Up to a factor; by name or by order; an exact label comes before, and one may be exact."""
    adata, fields = softly(lambda a: FORMS[form](a, SOFT), labels=["B", "CD4", "CD8"])
    order = [fields.classes.tolist().index(name) for name in ("B", "CD4", "CD8")]
    if form == "DataFrame":
        assert np.array(chances(fields, adata))[:, order].tolist() == EXPECTED
        assert fields.encode(adata).label.tolist() == [-1, order[1], -1, -1, order[1], -1]
        return
    assert fields.classes.tolist() == ["CD4", "B", "CD8"]  # by this order an array is read
    unlabelled = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(
        np.array(chances(fields, adata))[unlabelled], np.array(EXPECTED)[unlabelled]
    )


def test_columns_of_soft_labels_are_labels():
    """A label without a column has probability 0."""
    values = pd.DataFrame([[0.5, 0.5]] * 3, [f"cell{i}" for i in range(3)], ["B", "new"])
    adata, fields = softly(values, ["B", "T", "Unknown"], labels=None)
    assert fields.classes.tolist() == ["B", "T", "new"]
    assert chances(fields, adata)[2] == [0.5, 0, 0.5]
    adata.obsm["soft"] = values.rename(columns={"new": "newer"})
    with pytest.raises(InputError, match=r"obsm\['soft'\] has 1 labels .*newer"):
        fields.encode(adata)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (-SOFT, "negative, infinite or partly missing"),
        (np.where(SOFT == 8, np.inf, SOFT), "infinite"),
        (np.where(SOFT == 8, np.nan, SOFT), "partly missing .cell5"),
        (SOFT[:, :2], "2 columns without names, expected 3"),
        (np.full((6, 3), "a"), "does not hold numbers"),
        (np.ones((6, 3, 2)), "expected cells by labels"),
        (pd.DataFrame(SOFT, [f"cell{i}" for i in range(6)], ["B", "B", "CD4"]), "one label: B, B"),
        (pd.DataFrame(SOFT, [f"cell{i}" for i in range(6)], ["B", "T", "Unknown"]), "leave it out"),
    ],
)
def test_what_is_no_soft_label_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        softly(values)


# ---- annotators ---------------------------------------------------------------------------------


def test_further_annotators():
    adata = cells(["B", "T", "Unknown", "B"], two=["B", None, "T", "Unknown"], three=["NK"] * 4)
    fields = set_up(adata, annotator_keys=["two", "three"])
    assert fields.classes.tolist() == ["B", "T", "NK"]
    assert fields.sizes()["n_annotators"] == 3
    data = fields.encode(adata)
    assert data.annotations.tolist() == [[0, 2], [-1, 2], [1, 2], [-1, 2]]
    assert data.label.tolist() == [0, 1, -1, 0] and data.evidence is None
    found = data[np.arange(4)].label_evidence(3).exp()
    assert found.shape == (3, 4, 3) and found[1, 1].tolist() == [1, 1, 1]
    del adata.obs["two"]  # new cells may lack it
    assert fields.encode(adata).annotations[:, 0].tolist() == [-1] * 4


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "labels as text": ({"labels": "B"}, r"expected a list: \['B'\]"),
    "labels as a number": ({"labels": 3}, "expected a list of names"),
    "sets as a list": ({"label_sets": ["T"]}, "expected a dict"),
    "a set as text": ({"label_sets": {"T": "CD4"}}, r"label_sets\['T'\]='CD4', expected a list"),
    "an empty set": ({"label_sets": {"T": []}}, "is empty"),
    "parents as a list": ({"label_parents": ["T"]}, "from a label to its parent"),
    "a cycle of sets": ({"label_sets": {"a": ["b"], "b": ["a"]}}, "holds itself, by a > b"),
    "a cycle of parents": ({"label_parents": {"a": "b", "b": "a"}}, "holds itself"),
    "a set of itself": ({"label_sets": {"T": ["T", "CD4"]}}, "holds itself"),
    "a set said twice": ({"label_sets": T_CELLS, "label_parents": {"B": "T"}}, "in one of them"),
    "a label that is a set": ({"labels": ["T"], "label_sets": T_CELLS}, "also a set of labels"),
    "a label that is none": ({"labels": ["Unknown"]}, "labels names 'Unknown'"),
    "a set that is none": ({"label_sets": {"Unknown": ["B", "CD4"]}}, "names 'Unknown'"),
    "a member that is none": ({"label_parents": {"Unknown": "T"}}, "names 'Unknown'"),
    "no such column": ({"coarse_labels_key": "corse"}, "did you mean 'coarse'"),
    "no such annotator": ({"annotator_keys": ["corse"]}, "did you mean 'coarse'"),
    "no such matrix": ({"soft_labels_key": "soft"}, "obsm has no 'soft'.*there are: none"),
    "annotators as text": ({"annotator_keys": "coarse"}, "expected a list"),
    "an annotator twice": ({"annotator_keys": ["coarse", "coarse"]}, "twice"),
    "the first annotator": ({"annotator_keys": ["cell_type"]}, "is labels_key"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(given, message):
    adata = cells(["B", "CD4", "CD8", "Unknown"], coarse=["B", "CD4", "CD8", "Unknown"])
    with pytest.raises(InputError, match=message):
        set_up(adata, **given)


@pytest.mark.parametrize("role", ["coarse_labels_key", "annotator_keys"])
def test_look_alikes_of_unlabelled_are_refused(role):
    """At set-up, and in new cells."""
    given = {role: "more" if role == "coarse_labels_key" else ["more"]}
    known = cells(["B", "T", "Unknown"], more=["B", "T", "T"])
    fields = set_up(known, **given)
    trap = cells(["B", "T", "Unknown"], more=["B", "T", "unassigned"])
    for ask in (lambda: set_up(trap, **given), lambda: fields.encode(trap)):
        with pytest.raises(InputError, match=r"1 cells labelled 'unassigned'"):
            ask()


@pytest.mark.parametrize("given", [{"labels": ["cd4"]}, {"label_sets": {"T": ["cd4", "CD8"]}}])
def test_names_nearly_as_in_the_column_are_told(given):
    """A typing error would be a label of its own, without a cell."""
    adata = cells(["B", "CD4", "Unknown"])
    with pytest.warns(UserWarning, match="'CD4' and 'cd4' differ in case or blanks alone"):
        set_up(adata, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_up(adata, labels=["CD8"])


# ---- what is kept -------------------------------------------------------------------------------


def all_of_them() -> tuple[ad.AnnData, Fields]:
    adata = cells(LABELS, coarse=["B", "t", "t", None, "B", None], two=["B", None, *["CD4"] * 4])
    adata.obsm["soft"] = pd.DataFrame(SOFT, adata.obs_names, ["B", "CD4", "CD8/x"])
    fields = set_up(
        adata,
        labels=["NK/T", "β"],
        label_parents=TREE,
        coarse_labels_key="coarse",
        soft_labels_key="soft",
        annotator_keys=["two"],
    )
    return adata, fields


@pytest.mark.parametrize("file", ["h5ad", "zarr"])
def test_notes_survive_files(tmp_path, file):
    adata, fields = all_of_them()
    adata.obsm["soft"].columns = ["B", "CD4", "CD8|x"]  # files take no slash
    fields.note(adata)
    before = fields.encode(cells(LABELS, coarse=adata.obs["coarse"].to_numpy()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(adata, f"write_{file}")(tmp_path / f"cells.{file}")
        found = getattr(ad, f"read_{file}")(tmp_path / f"cells.{file}")
    again = Fields.from_uns(found)
    assert again.sources == fields.sources and again.classes.tolist() == fields.classes.tolist()
    assert again.encode(cells(LABELS, coarse=adata.obs["coarse"].to_numpy())).equals(before)


def test_old_notes_open():
    """Those of before know of no sources."""
    adata, fields = all_of_them()
    fields.note(adata)
    del adata.uns["pyro_scanvi"]["setup"]["sources"]
    assert Fields.from_uns(adata).sources == LabelSources()


EDITS = {  # columns of obs
    "coarse": ["B", "t", "t", "B", "B", None],
    "two": ["B"] * 6,
    "cell_type": ["B", "CD4", "CD8", "B", "T", "T"],
}


@pytest.mark.parametrize("edited", [*EDITS, "soft"])
def test_edits_are_seen(edited):
    adata, fields = all_of_them()
    data = fields.encode(adata)
    fields.check_labels_unchanged(adata, data)
    if edited in EDITS:
        adata.obs[edited] = EDITS[edited]
    else:
        adata.obsm["soft"] = np.full((6, 6), 1.0)
    with pytest.raises(InputError, match=r"or what else says labels\) has changed"):
        fields.check_labels_unchanged(adata, data)

"""Names: one category in whatever type it comes, and labels that mean that none is known."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.names import bare, look_alikes, name_of, reads_unlabeled
from tests.examples import SMALL, as_they_are, mostly_slow, simulated, small_model


@pytest.mark.parametrize("value", [7, 7.0, np.int8(7), np.float32(7), "7", "7.0", np.str_("7")])
def test_a_number_has_one_name(value):
    assert name_of(value) == "7"


@pytest.mark.parametrize(
    ("value", "name"),
    [(0.5, "0.5"), (True, "True"), (np.bool_(False), "False"), ("T.0", "T.0"), ("-1.0", "-1")],
)
def test_other_names_stay(value, name):
    assert name_of(value) == name


NEAR = ["unknown", "UNKNOWN", "Unknown ", " unknown", "Unknwon", "un-known", "Unassigned"]
NEAR += ["nan", "NaN", "NA", "N/A", "<NA>", "None", "null", "", "?", "-", "unlabelled", "Unlabeled"]
NEAR += ["not annotated", "undetermined"]
FAR = [
    "B",
    "T",
    "NK",
    "naive T",
    "Naive",
    "Nanog+",
    "null cell B",
    "0",
    "-1",
    "1",
    "Other",
    "missed",
]


@pytest.mark.parametrize("name", NEAR)
def test_labels_that_mean_that_none_is_known(name):
    assert reads_unlabeled(name, "Unknown")
    adata = simulated()
    adata.obs.loc[adata.obs_names[:7], "cell_type"] = name
    with pytest.raises(InputError, match="7 cells labelled .* reads as if") as error:
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    assert repr(name) in str(error.value) and not adata.uns
    exec(str(error.value).split("Rename them: ")[1].split("; or give")[0], {"adata": adata})
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")  # the cure that it names works
    assert list(Fields.from_uns(adata).classes) == ["B", "NK", "T"]


@pytest.mark.parametrize("name", FAR)
def test_types_are_no_such_labels(name):
    assert not reads_unlabeled(name, "Unknown")


def test_a_number_for_unlabelled_is_no_other_number():
    assert not reads_unlabeled("1", "-1")
    assert bare("-1") == "-1"


def test_labels_that_differ_in_case_or_blanks_are_said():
    assert look_alikes(["B", "b", "T cell", "Tcell", "CD4+", "CD4-"]) == [
        ["B", "b"],
        ["T cell", "Tcell"],
    ]
    adata = simulated()
    adata.obs.loc[adata.obs["truth"] == "T", "cell_type"] = "T"
    adata.obs.loc[adata.obs_names[2], "cell_type"] = "T "
    with pytest.warns(UserWarning, match="'T' and 'T ', which differ in case or blanks"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")


def test_a_missing_value_is_an_unlabelled_cell():
    """As if the column named it; whatever the type of what is missing."""
    expected = small_model(simulated()).train(2, progress_bar=False).predict(soft=True)
    for missing in (np.nan, None, pd.NA):
        adata = simulated()
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(object).replace({"Unknown": missing})
        model = small_model(adata).train(2, progress_bar=False)
        pd.testing.assert_frame_equal(model.predict(soft=True), expected)


@pytest.mark.parametrize("unlabeled", [np.nan, None, pd.NA])
def test_missing_values_alone_may_be_unlabelled(unlabeled):
    adata = simulated()
    adata.obs["cell_type"] = adata.obs["cell_type"].replace({"Unknown": None})
    SCANVI.setup_anndata(adata, "cell_type", unlabeled)
    assert list(Fields.from_uns(adata).classes) == ["B", "NK", "T"]


def numbered(dtype) -> ad.AnnData:
    """Labels 1, 2, 3 and batches 0, 1, as some type."""
    adata = simulated()
    codes = {"B": 1, "NK": 2, "T": 3, "Unknown": 0}
    adata.obs["cell_type"] = adata.obs["cell_type"].map(codes).astype(dtype)
    adata.obs["batch"] = pd.Series(np.arange(120) % 2, index=adata.obs_names).astype(dtype)
    return adata


DTYPES = ["int64", "int8", "float64", "float32", "Int64", "Float64", "str", "string", "category"]


@pytest.mark.parametrize("of_reference", mostly_slow(DTYPES))
def test_categories_are_known_in_any_type(tmp_path, of_reference):
    """Reference, query, saved model and answers."""
    adata = numbered(of_reference)
    SCANVI.setup_anndata(adata, "cell_type", 0, batch_key="batch")
    model = SCANVI(adata, **SMALL).train(1, progress_bar=False)
    model.save(tmp_path / "model")
    expected = model.get_elbo(feed_labels=True, seed=0)
    one_batch = model.get_normalized_expression(transform_batch=1, seed=0)
    for dtype in DTYPES:
        query = numbered(dtype)
        assert model.get_elbo(query, feed_labels=True, seed=0) == expected
        loaded = SCANVI.load(tmp_path / "model", query)
        assert loaded.get_elbo(feed_labels=True, seed=0) == expected
        mapped = SCANVI.load_query_data(query, model)
        assert len(mapped.fields.batches) == 2 and len(mapped.fields.classes) == 3
        for name in (1, 1.0, "1", np.int8(1)):
            found = loaded.get_normalized_expression(transform_batch=name, seed=0)
            pd.testing.assert_frame_equal(found, one_batch)
    tables = [
        model.differential_expression(
            groupby="cell_type", group1=group, group2="2", seed=0, n_samples_overall=10, silent=True
        )
        for group in (1, 1.0, "1")
    ]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def test_new_batches_of_another_type_join(tmp_path):
    adata = numbered("int64")
    SCANVI.setup_anndata(adata, "cell_type", 0, batch_key="batch")
    model = SCANVI(adata, **SMALL)
    query = numbered("float64")
    query.obs["batch"] = ["1.0", "donor"] * 60
    grown = SCANVI.load_query_data(query, model)
    assert [name_of(name) for name in grown.fields.batches] == ["0", "1", "donor"]


@pytest.mark.filterwarnings("ignore:no cell of the query:UserWarning")
def test_a_query_with_another_word_for_unlabelled():
    """It is not told to make a type of it, and cannot."""
    model = as_they_are(small_model(simulated()))
    query = simulated()
    query.obs["cell_type"] = query.obs["cell_type"].replace({"Unknown": "unknown"})
    for ask in (
        lambda: model.predict(query, keep_observed=True),
        lambda: SCANVI.load_query_data(query, model),
    ):
        with pytest.raises(InputError, match="'unknown', which reads as if.*'unknown': 'Unknown'"):
            ask()
    with pytest.raises(InputError, match="'unknown' reads like the unlabelled category"):
        SCANVI.load_query_data(query, model, extend_labels=["unknown"])
    query.obs["cell_type"] = query.obs["cell_type"].replace({"unknown": None})
    SCANVI.load_query_data(query, model)


KEYS = [
    ({"categorical_covariate_keys": "donor"}, r"expected a list: \['donor'\]"),
    ({"continuous_covariate_keys": "age"}, r"expected a list: \['age'\]"),
    ({"categorical_covariate_keys": [3]}, "expected a list of names"),
    ({"categorical_covariate_keys": ["donor", "donor"]}, "names 'donor' twice"),
    ({"batch_key": ["donor"]}, "name of one column of obs: 'donor'"),
    ({"labels_key": ["cell_type"]}, "name of one column of obs: 'cell_type'"),
    ({"size_factor_key": 3}, "size_factor_key=3, expected the name of one column"),
    ({"unlabeled_category": ["Unknown", "?"]}, "expected one value"),
    ({"layer": ["counts"]}, "expected the name of a layer"),
    ({"batch_key": "doubled"}, "obs has 2 columns 'doubled'; keep one"),
]


@pytest.mark.parametrize(("given", "message"), KEYS, ids=str)
def test_keys_are_names(given, message):
    adata = simulated()
    adata.obs["donor"], adata.obs["age"] = ["a", "b"] * 60, 1.0
    twice = pd.DataFrame([["x", "y"]] * 120, adata.obs_names, ["doubled", "doubled"])
    adata.obs = pd.concat([adata.obs, twice], axis=1)
    keys = {"labels_key": "cell_type", "unlabeled_category": "Unknown"} | given
    with pytest.raises(InputError, match=message):
        SCANVI.setup_anndata(adata, **keys)


@pytest.mark.parametrize(("names", "what"), [("obs_names", "cells"), ("var_names", "genes")])
@pytest.mark.parametrize("name", ["nan", ""])
def test_cells_and_genes_have_names(names, what, name):
    adata = simulated()
    setattr(adata, names, [name, *getattr(adata, names)[1:]])
    with pytest.raises(InputError, match=rf"1 {what} have no name, at the positions \(0\)"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")

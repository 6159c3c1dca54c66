"""From an AnnData to arrays: what is read, what is refused, what survives a file."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_array, csc_matrix, csr_array, csr_matrix

from pyro_scanvi import SCANVI, InputError, drop_empty_cells
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import UNLABELED
from tests.examples import as_they_are, mostly_slow, simulated

N, G = 24, 6


def some_cells(labels=("B", "Unknown", "T"), **columns) -> ad.AnnData:
    """24 cells of 6 genes, their labels repeated in turn, with more columns of obs."""
    adata = simulated(n=N, n_genes=G)
    adata.obs["cell_type"] = pd.Categorical([labels[i % len(labels)] for i in range(N)])
    for name, values in columns.items():
        adata.obs[name] = np.resize(values, N)
    return adata


def set_up(adata: ad.AnnData, unlabeled="Unknown", **keys) -> Fields:
    return Fields.from_anndata(adata, "cell_type", unlabeled, **keys)


# ---- labels and batches -------------------------------------------------------------------------

IN_ORDER = ["B", "T", "Unknown"]
COLUMNS = {  # values of the first three cells, unlabelled category, classes
    "categories": (pd.Categorical(["B", "Unknown", "T"]), "Unknown", ["B", "T"]),
    "plain strings": (["B", "Unknown", "T"], "Unknown", ["B", "T"]),
    "their own order": (pd.Categorical(["T", "U", "B"], ["U", "T", "B"]), "U", ["T", "B"]),
    "unlabelled in the middle": (pd.Categorical(["a", "m", "z"]), "m", ["a", "z"]),
    "declared, but empty": (pd.Categorical(["B", "U", "T"], list("ABUTZ")), "U", ["B", "T"]),
    "integers": ([7, -1, 3], "-1", [3, 7]),
    "integers, unlabelled given as one": ([7, -1, 3], -1, [3, 7]),
    "booleans": ([True, False, True], "Unknown", [False, True]),
    "floats": ([0.5, 1.0, 2.0], "1.0", [0.5, 2.0]),
    "floats, unlabelled given as an integer": ([0.5, 1.0, 2.0], 1, [0.5, 2.0]),
    "nullable integers": (pd.array([7, 1, 3], dtype="Int64"), "1", [3, 7]),
    "nullable booleans": (pd.array([True, False, True], dtype="boolean"), "?", [False, True]),
    "pandas strings": (pd.array(["B", "U", "T"], dtype="string"), "U", ["B", "T"]),
    "slashes": (["CD4/T", "?", "CD4"], "?", ["CD4", "CD4/T"]),
    "not ASCII": (["β", "Unknown", "细胞"], "Unknown", ["β", "细胞"]),
    "unlabelled is empty": (["", "T", "B"], "", ["B", "T"]),
}


@pytest.mark.parametrize(("column", "unlabeled", "classes"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.filterwarnings("ignore:.*does not occur in.*:UserWarning")
def test_labels_and_batches_as_they_come(column, unlabeled, classes):
    """The same column as labels and as batch."""
    adata = some_cells()
    values = pd.Series(column)
    repeated = values.take(np.arange(N) % 3).reset_index(drop=True).set_axis(adata.obs_names)
    adata.obs["cell_type"] = adata.obs["batch"] = repeated
    fields = set_up(adata, unlabeled, batch_key="batch")
    data = fields.encode(adata)
    assert list(fields.classes) == classes
    expected = [classes.index(v) if v in classes else UNLABELED for v in values]
    assert data.label.tolist() == expected * (N // 3)
    assert [fields.batches[code] for code in data.batch] == list(values) * (N // 3)
    assert sorted(fields.batches, key=str) == sorted(values.unique(), key=str)


@pytest.mark.parametrize(
    ("unlabeled", "keys", "message"),
    [
        ("?", {}, r"'\?' does not occur in obs\['cell_type'\]: all 24 cells count as labelled"),
        ("Unknown", {"batch_key": "one"}, r"obs\['one'\] has one value, 'x'"),
    ],
)
def test_what_is_allowed_but_said(unlabeled, keys, message):
    adata = some_cells(("B", "NK", "T") if unlabeled == "?" else ("B", "Unknown", "T"), one="x")
    with pytest.warns(UserWarning, match=message):
        fields = set_up(adata, unlabeled, **keys)
    assert fields.encode(adata).batch.tolist() == [0] * N


def test_covariates_and_size_factors():
    adata = some_cells(site=["x", "y", "x"], **{"a/b": [1, 2]}, age=[1, 2.5], size=[10, 20])
    fields = set_up(
        adata,
        size_factor_key="size",
        categorical_covariate_keys=["site", "a/b"],
        continuous_covariate_keys=["age"],
    )
    data = fields.encode(adata)
    np.testing.assert_array_equal(data.categorical[:3], [[0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(data.continuous[:2], np.float32([[1], [2.5]]))
    np.testing.assert_array_equal(data.size_factor[:2], np.float32([[10], [20]]))


# ---- counts -------------------------------------------------------------------------------------

MATRICES = {
    "dense": np.asarray,
    "CSR": csr_matrix,
    "CSC": csc_matrix,
    "CSR array": csr_array,
    "CSC array": csc_array,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.int16], ids=str)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_counts_of_any_type_give_the_same_minibatch(matrix, dtype):
    expected = some_cells()
    expected.X = np.minimum(expected.X, 200)
    adata = expected.copy()
    adata.X = matrix(expected.X.astype(dtype))
    x = set_up(adata).encode(adata)[np.arange(N)].x
    np.testing.assert_array_equal(x, expected.X)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_a_gene_without_counts_is_allowed(matrix):
    adata = some_cells()
    adata.X[:, 3] = 0
    adata.X = matrix(adata.X)
    assert (set_up(adata).encode(adata)[np.arange(N)].x[:, 3] == 0).all()


def test_layer():
    adata = some_cells()
    adata.layers["counts"], adata.X = adata.X, None
    x = set_up(adata, layer="counts").encode(adata)[np.arange(N)].x
    np.testing.assert_array_equal(x, some_cells().X)


BAD_VALUES = {
    "negative": (-1, "negative: -1"),
    "fractional": (40.5, "fractional: 40.5"),
    "small and fractional": (0.5, "fractional: 0.5 .* look log-normalised"),
    "NaN": (np.nan, "not finite: nan"),
    "infinite": (np.inf, "not finite: inf"),
    "minus infinity": (-np.inf, "negative: -inf"),
}


@pytest.mark.parametrize(("value", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("gene", [0, 5])
def test_no_counts_name_the_first_cell_and_gene(matrix, gene, value, message):
    adata = some_cells()
    adata.X = np.minimum(adata.X, 20)
    adata.X[7, gene] = adata.X[9, 1] = value
    adata.X = matrix(adata.X)
    with pytest.raises(InputError, match=message) as error:
        set_up(adata)
    assert f"in cell 'cell7', gene 'gene{gene}', and 1 more like it" in str(error.value)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_log_normalised_data_are_no_counts(matrix):
    adata = some_cells()
    adata.X = matrix(np.log1p(adata.X / adata.X.sum(axis=1, keepdims=True) * 1e4))
    with pytest.raises(InputError, match="these look log-normalised; expected raw counts"):
        set_up(adata)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_cells_without_counts(matrix):
    adata = some_cells()
    adata.X[[3, 11]] = 0
    adata.X = matrix(adata.X)
    with pytest.raises(InputError, match=r"cells without counts: 2 \(cell3, cell11\)"):
        set_up(adata)
    kept = drop_empty_cells(adata)
    assert list(kept.obs_names) == [f"cell{i}" for i in range(N) if i not in (3, 11)]
    set_up(kept)


def test_a_cell_whose_values_cancel_is_not_empty_but_wrong():
    adata = some_cells()
    adata.X[3] = [2, -2, 0, 0, 0, 0]
    with pytest.raises(InputError, match="negative: -2 in cell 'cell3', gene 'gene1'"):
        drop_empty_cells(adata)


@pytest.mark.parametrize("matrix", [csr_matrix, csc_matrix])
@pytest.mark.parametrize("part", ["indices", "indptr"])
def test_a_broken_sparse_matrix_is_an_error_and_no_crash(matrix, part):
    adata = some_cells()
    adata.X = matrix(adata.X)
    getattr(adata.X, part)[2] = 2**30
    with pytest.raises(InputError, match="the sparse matrix of the counts is broken"):
        set_up(adata)


# ---- what is refused ----------------------------------------------------------------------------


def changed(**changes) -> ad.AnnData:
    """Cells with attributes set anew."""
    adata = some_cells(
        site=["x", "y"],
        age=[1.0, 2.0],
        zero=[1.0, 0.0],
        holes=[1.0, np.nan],
        gap=pd.Series(["x", None]),
        alike=pd.Series([1, "1"], dtype=object),
    )
    for name, value in changes.items():
        setattr(adata, name, value)
    return adata


def with_labels(*labels) -> ad.AnnData:
    adata = changed()
    adata.obs["cell_type"] = [labels[i % len(labels)] for i in range(N)]
    return adata


REFUSED = {  # AnnData, further keys, message
    "no AnnData": (pd.DataFrame(), {}, "got a DataFrame, expected an AnnData"),
    "no cells": (changed()[:0].copy(), {}, "0 cells and 6 genes"),
    "no genes": (changed()[:, :0].copy(), {}, "24 cells and 0 genes"),
    "no counts": (changed(X=None), {}, "X is empty; name the layer"),
    "strings for counts": (changed(X=np.full((N, G), "x", dtype=object)), {}, "dtype object"),
    "booleans for counts": (changed(X=np.ones((N, G), dtype=bool)), {}, "dtype bool"),
    "complex counts": (changed(X=np.ones((N, G), dtype=complex)), {}, "dtype complex128"),
    "no such layer": (changed(), {"layer": "count"}, "no layer 'count'; there are: none"),
    "no such labels": (changed(), {"labels_key": "cell_typ"}, "did you mean 'cell_type'?"),
    "nothing like it": (changed(), {"labels_key": "?"}, "there are: cell_type, truth, site"),
    "no such batch": (changed(), {"batch_key": "sit"}, "no column 'sit'; did you mean 'site'"),
    "no such size": (changed(), {"size_factor_key": "n"}, "obs has no column 'n'"),
    "no such value": (changed(), {"continuous_covariate_keys": ["n"]}, "no column 'n'"),
    "no such covariate": (changed(), {"categorical_covariate_keys": ["n"]}, "no column 'n'"),
    "NaN, and one label": (with_labels("B", None), {}, "a single class, 'B'"),
    "NaN among covariates": (
        changed(),
        {"categorical_covariate_keys": ["gap"]},
        r"obs\['gap'\] has no value in 12",
    ),
    "NaN among batches": (changed(), {"batch_key": "gap"}, r"obs\['gap'\] has no value in 12"),
    "labels that read alike": (changed(), {"labels_key": "alike"}, r"read alike \(1\)"),
    "nothing labelled": (with_labels("Unknown"), {}, "no cell is labelled"),
    "a single class": (with_labels("Unknown", "B"), {}, "a single class, 'B'"),
    "text as covariate": (changed(), {"continuous_covariate_keys": ["site"]}, "hold numbers"),
    "NaN as covariate": (changed(), {"continuous_covariate_keys": ["holes"]}, "not finite.*cell1"),
    "zero as size": (changed(), {"size_factor_key": "zero"}, "not positive, first in cell 'cell1'"),
}


@pytest.mark.parametrize(("adata", "keys", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(adata, keys, message):
    keys = {"labels_key": "cell_type", "unlabeled_category": "Unknown"} | keys
    with pytest.raises(InputError, match=message):
        SCANVI.setup_anndata(adata, **keys)
    assert not isinstance(adata, ad.AnnData) or not adata.uns


@pytest.mark.parametrize(("names", "what"), [("obs_names", "cells"), ("var_names", "genes")])
def test_duplicated_names(names, what):
    adata = some_cells()
    with warnings.catch_warnings():  # anndata's own
        warnings.simplefilter("ignore")
        setattr(adata, names, ["twice", "twice", *getattr(adata, names)[2:]])
    with pytest.raises(InputError, match=rf"names of {what} that occur twice: 1 \(twice\)"):
        set_up(adata)


def test_not_set_up():
    with pytest.raises(InputError, match="has not been set up; call SCANVI.setup_anndata"):
        SCANVI(some_cells())


# ---- new cells ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    adata = some_cells(batch=["b1", "b2"])
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    return as_they_are(SCANVI(adata, n_hidden=4))


def new(**columns) -> ad.AnnData:
    return some_cells(**({"batch": ["b2", "b1"]} | columns))


def without(adata: ad.AnnData, column: str) -> ad.AnnData:
    del adata.obs[column]
    return adata


UNREADABLE = {
    "a label never seen": (new(labels=["B", "NK/T"]), r"1 labels .* not seen \(NK/T\); it knows B"),
    "a batch never seen": (new(batch=["b1", "b3"]), r"obs\['batch'\] has 1 batches .* \(b3\)"),
    "no batch": (without(new(), "batch"), "obs has no column 'batch'"),
    "genes missing": (new()[:, 1:].copy(), r"1 of 6 are missing \(gene0\), 0 are new"),
    "no cells": (new()[:0].copy(), "0 cells and 6 genes"),
}


@pytest.mark.parametrize(("adata", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_new_cells_that_the_model_cannot_read(model, adata, message):
    with pytest.raises(InputError, match=message):
        model.get_normalized_expression(adata)


def test_new_cells_may_come_without_labels(model):
    expected = model.predict(new())
    assert model.predict(without(new(), "cell_type")).tolist() == expected.tolist()
    assert model.predict(new(labels=["Unknown"])).tolist() == expected.tolist()
    assert model.predict(new(labels=["T"])).tolist() == expected.tolist()


# ---- what survives a file -----------------------------------------------------------------------

SETTINGS = {
    "labels alone": {},
    "batch": {"batch_key": "site"},
    "size factors": {"size_factor_key": "size"},
    "layer": {"layer": "counts"},
    "covariates": {
        "batch_key": "site",
        "categorical_covariate_keys": ["site", "p/q", "old"],
        "continuous_covariate_keys": ["age", "size"],
    },
}


ANY_LABELS = [("B", "Unknown", "T"), (3, -1, 1), (True, "?", False)]


@pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("labels", mostly_slow(ANY_LABELS), ids=str)
@pytest.mark.filterwarnings("ignore:Forward slashes:FutureWarning")
def test_setup_survives_a_file(tmp_path, keys, labels):
    adata = some_cells(
        labels if "?" not in labels else list(map(str, labels)),
        site=["x", "y"],
        old=[True, False],
        age=[1.0, 2.0],
        size=[9.0, 8.0, 7.0],
        **{"p/q": ["r", "s", "t"]},
    )
    adata.layers["counts"] = adata.X + 1
    SCANVI.setup_anndata(adata, "cell_type", labels[1], **keys)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_equal(again.uns["pyro_scanvi"], adata.uns["pyro_scanvi"])
    models = [as_they_are(SCANVI(cells, n_hidden=4)) for cells in (adata, again)]
    pd.testing.assert_frame_equal(*(model.predict(soft=True) for model in models))

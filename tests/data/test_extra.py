"""Further data of cells by name: what is read of an AnnData, what is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from pyro_scanvi import InputError
from pyro_scanvi.data.extra import Extra
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import Named
from pyro_scanvi.surgery.query import prepare
from tests.examples import simulated

N, G = 24, 6
VALUES = np.arange(N * 2).reshape(N, 2) % 7 + 1.0


def cells(**obsm):
    adata = simulated(N, G)
    adata.obsm.update(obsm)
    return adata


def set_up(adata, **extra) -> Fields:
    return Fields.from_anndata(adata, "cell_type", "Unknown", extra=extra)


FORMS = {
    "array": np.asarray,
    "integers": lambda v: v.astype(np.int16),
    "booleans": lambda v: v > 3,
    "CSR": csr_matrix,
    "CSC": csc_matrix,
    "DataFrame": lambda v: pd.DataFrame(v, [f"cell{i}" for i in range(N)], ["a", "b"]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_obsm_as_it_comes(form):
    adata = cells(p=form(VALUES))
    data = set_up(adata, protein="obsm/p").encode(adata)
    found = data[np.array([5, 2])].extra["protein"]
    expected = np.asarray(VALUES > 3 if form is FORMS["booleans"] else VALUES, dtype=np.float32)
    np.testing.assert_array_equal(found, expected[[5, 2]])
    assert hasattr(data.extra["protein"], "indptr") == hasattr(adata.obsm["p"], "indptr")


@pytest.mark.parametrize("kind", ["dense", "CSR"])
def test_nothing_is_shared(kind):
    values = VALUES.astype(np.float32)
    adata = cells(p=values if kind == "dense" else csr_matrix(values))
    adata.layers["spliced"] = adata.X.copy() if kind == "dense" else csr_matrix(adata.X)
    adata.obs["age"] = np.float32(1.0)
    fields = set_up(adata, protein="obsm/p", spliced="layers/spliced", age="obs/age")
    data, before = fields.encode(adata), fields.encode(adata)
    for matrix in (adata.obsm["p"], adata.layers["spliced"]):
        matrix *= 3
    adata.obs.loc[:, "age"] = np.float32(5)
    assert data.equals(before) and not fields.encode(adata).equals(before)


def test_layers_have_the_genes_of_the_model():
    adata = cells()
    adata.layers["spliced"] = csr_matrix(adata.X + 1)
    fields = Fields.from_anndata(
        adata, "cell_type", "Unknown", n_top_genes=3, extra={"s": "layers/spliced"}
    )
    new = adata[:, ::-1].copy()
    found = fields.encode(new).extra["s"]
    np.testing.assert_array_equal(
        found.toarray(), adata[:, fields.genes].layers["spliced"].toarray()
    )
    assert fields.sizes()["n_extra"] == {"s": 3}
    assert fields.columns()["s"].tolist() == fields.genes.tolist()


@pytest.mark.parametrize("form", [np.asarray, csr_matrix])
def test_a_row_of_nan_was_not_measured(form):
    values = VALUES.copy()
    values[[3, 20]] = np.nan
    adata = cells(p=form(values))
    data = set_up(adata, protein="obsm/p").encode(adata)
    np.testing.assert_array_equal(data[np.arange(N)].extra["protein"], values)
    assert data.equals(set_up(adata, protein="obsm/p").encode(adata))
    measured = cells(p=form(np.nan_to_num(values, nan=1.0)))
    assert not data.equals(set_up(measured, protein="obsm/p").encode(measured))


def test_data_of_other_names_are_not_equal():
    adata = cells(p=VALUES)
    one, other = (set_up(adata, **{n: "obsm/p"}).encode(adata) for n in ("one", "other"))
    assert not one.equals(other) and one.subset(np.arange(3)).extra["one"].shape == (3, 2)


def test_columns_are_found_by_name():
    fields = set_up(cells(p=FORMS["DataFrame"](VALUES)), protein="obsm/p")
    frame = FORMS["DataFrame"](VALUES).assign(c=9.0)[["c", "b", "a"]]
    np.testing.assert_array_equal(fields.encode(cells(p=frame)).extra["protein"], VALUES)
    with pytest.raises(InputError, match=r"obsm\['p'\] lacks 1 columns \(a\)"):
        fields.encode(cells(p=frame[["b", "c"]]))
    with pytest.raises(InputError, match=r"no names of columns.*by name \(a, b\)"):
        fields.encode(cells(p=VALUES))
    fields = set_up(cells(p=VALUES), protein="obsm/p")
    with pytest.raises(InputError, match="has 3 columns, expected 2"):
        fields.encode(cells(p=np.ones((N, 3))))


def with_(at, value, form=np.asarray):
    values = VALUES.copy()
    values[at] = value
    return form(values)


def refused():
    text = FORMS["DataFrame"](VALUES).assign(b="x")
    twice = FORMS["DataFrame"](VALUES).set_axis(["a", "a"], axis=1)
    yield (
        {"protein": "obsm/q"},
        {"p": VALUES},
        "obsm has no 'q', which the model reads as 'protein'",
    )
    yield {"protein": "obsm/proteins"}, {"protein": VALUES}, "did you mean 'protein'"
    yield {"protein": "layers/p"}, {}, "layers has no 'p'.*there are: none"
    yield {"protein": "obs/truht"}, {}, "obs has no 'truht'.*did you mean 'truth'"
    yield {"protein": "X"}, {}, "names the place 'X'; expected 'layers/KEY'"
    yield {"protein": "uns/p"}, {}, "expected 'layers/KEY'"
    yield {"protein": "obsm/"}, {}, "expected 'layers/KEY'"
    yield {"protein": 3}, {}, "names the place 3"
    yield {"a b": "obsm/p"}, {"p": VALUES}, "names 'a b', expected a name as of a variable"
    yield {"class": "obsm/p"}, {"p": VALUES}, "names 'class'"
    yield {"truth": "obs/truth"}, {}, "no numbers; .* goes into categorical_covariate_keys"
    yield {"p": "obsm/p"}, {"p": text}, r"columns that are no numbers \(b\)"
    yield {"p": "obsm/p"}, {"p": twice}, "two columns 'a'"
    yield {"p": "obsm/p"}, {"p": VALUES + 1j}, "complex128, expected real numbers"
    yield {"p": "obsm/p"}, {"p": VALUES[:, :0]}, r"shape \(24, 0\)"
    yield {"p": "obsm/p"}, {"p": VALUES[..., None]}, r"shape \(24, 2, 1\)"
    yield {"p": "obsm/p"}, {"p": VALUES * np.nan}, "NaN in all cells"
    for form in (np.asarray, csr_matrix, FORMS["DataFrame"]):
        column = "'b'" if form is FORMS["DataFrame"] else "'1'"
        for value in (np.nan, np.inf, 1e39):
            values = with_((7, 1), value, form)
            told = "inf" if value == 1e39 else value
            yield {"p": "obsm/p"}, {"p": values}, f"finite: {told} in cell 'cell7', column {column}"


@pytest.mark.parametrize(("extra", "obsm", "message"), list(refused()))
def test_refused(extra, obsm, message):
    with pytest.raises(InputError, match=message):
        set_up(cells(**obsm), **extra)


@pytest.mark.parametrize("form", [np.asarray, csr_matrix])
def test_numbers_of_genes_and_of_cells_are_all_there(form):
    adata = cells()
    values = adata.X.copy()
    values[4] = np.nan  # a row of a layer may not lack
    adata.layers["s"], adata.obs["age"] = form(values), [np.nan] * 2 + [1.0] * (N - 2)
    with pytest.raises(InputError, match=r"layers\['s'\] .*nan in cell 'cell4', column 'gene0'"):
        set_up(adata, s="layers/s")
    with pytest.raises(InputError, match=r"obs\['age'\] is not finite: nan in cell 'cell0'"):
        set_up(adata, age="obs/age")


def test_not_a_mapping():
    with pytest.raises(InputError, match=r"extra=\['obsm/p'\]; expected 'layers/KEY'"):
        Fields.from_anndata(cells(p=VALUES), "cell_type", "Unknown", extra=["obsm/p"])


def test_a_broken_sparse_matrix_is_an_error_and_no_crash():
    adata = cells(p=csr_matrix(VALUES))
    adata.obsm["p"].indices[0] = 2**30
    with pytest.raises(InputError, match=r"the sparse matrix of obsm\['p'\] is broken"):
        set_up(adata, p="obsm/p")


def test_layers_that_lack_genes_of_the_model():
    """As where the counts stand in raw, which has more."""
    adata = cells()
    adata.raw = adata.copy()
    adata = adata[:, :3].copy()
    adata.layers["s"] = adata.X
    with pytest.raises(
        InputError, match=r"layers\['s'\] lacks 3 genes of the model \(gene3, gene4"
    ):
        Fields.from_anndata(adata, "cell_type", "Unknown", use_raw=True, extra={"s": "layers/s"})


def test_a_name_that_is_not_there_says_why():
    named = Named({"a": 1}, {"b": "b is broken"})
    with pytest.raises(InputError, match="b is broken"):
        named.each(str)["b"]
    with pytest.raises(InputError, match="no extra data 'c', only: a; name it in SCANVI.setup"):
        named["c"]


def test_the_place_as_one_writes_it():
    assert Extra("p", "obsm/a/b").where == "obsm['a/b']"


def test_a_query_of_raw_counts_keeps_its_layers_of_extra_data():
    """Counts in raw have genes of their own; a layer has those of X."""
    adata = cells()
    adata.raw = adata.copy()
    adata.layers["s"] = csr_matrix(adata.X + 1)
    fields = Fields.from_anndata(
        adata, "cell_type", "Unknown", use_raw=True, extra={"s": "layers/s"}
    )
    new = adata[:, 1:].copy()
    new.raw = adata
    expected = np.where(np.arange(G) > 0, adata.X + 1, 0)
    found = fields.encode(prepare(new, fields)).extra["s"]
    np.testing.assert_array_equal(found.toarray(), expected)


def test_a_mudata_is_told_where_its_modalities_go():
    mudata = type("MuData", (), {})()
    with pytest.raises(
        InputError, match="got a MuData, expected an AnnData: that of its RNA, with"
    ):
        set_up(mudata, protein="obsm/protein")

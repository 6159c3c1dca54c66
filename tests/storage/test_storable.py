"""Whatever `annotate` adds can be written, by h5ad and by zarr, for any label and index.

A warning is an error here, but for those of the libraries that an AnnData without our part gives
too. Run it under another anndata, as in `README.md`, to see whether that one takes it.
"""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi.storage.storable import LONGEST, storable, storable_names
from tests.examples import as_they_are, mostly_slow, simulated, small_model

OF_THE_WRITERS = (  # of what they will change, whatever is written
    "ignore:Writing zarr v2 data:UserWarning",
    "ignore:zarr v3 autosharding:UserWarning",
    "ignore:The 'future.infer_string' option",
    "ignore:Consolidated metadata:UserWarning",
)
pytestmark = [pytest.mark.filterwarnings(message) for message in OF_THE_WRITERS]
LONG = "x" * 300

NAMES = {  # names, and what they are called
    "as they are": (["B", "T cell", "β", "_x", ".x", "a.b", "%2F", "nan", " T"], None),
    "a slash": (["CD4/CD8 T", "T/B"], ["CD4|CD8 T", "T|B"]),
    "one inside another": (["T", "T/NK", "T/NK/x"], ["T", "T|NK", "T|NK|x"]),
    "at the root": (["/T", "B"], ["|T", "B"]),
    "empty parts": (["T/", "T//B", "/"], ["T|", "T||B", "|"]),
    "taken by one that stays": (["T/NK", "T|NK"], ["0: T|NK", "T|NK"]),
    "taken by one that changes": (["T/", "T|/", "T//"], ["T|", "T||", "2: T||"]),
    "a number too": (["T/NK", "T|NK", "0: T|NK"], ["0: 0: T|NK", "T|NK", "0: T|NK"]),
    "nothing": (["", " ", "\t"], ["0: ", "1:  ", "2: \t"]),
    "steps of a path": ([".", "..", "...", "T/."], ["0: .", "1: ..", "2: ...", "T|."]),
    "the index": (["_index", "B"], ["0: _index", "B"]),
    "of zarr": (["zarr.json", ".zattrs", "__x"], ["0: zarr.json", "1: .zattrs", "2: __x"]),
    "case": (["t", "T", "ß", "ss"], ["t", "1: T", "ß", "3: ss"]),
    "accents": (["\u00e9", "e\u0301"], ["\u00e9", "1: e\u0301"]),
    "long": ([LONG, LONG + "y"], [LONG[:LONGEST], "1: " + LONG[:LONGEST]]),
    "long, in two bytes": (["x" + "é" * 150], ["x" + "é" * 99]),
    "no key": (["a\0b", "\ud800"], ["a|b", "?"]),
    "numbers": ([1, 2.5, True], ["1", "2.5", "True"]),
}


@pytest.mark.parametrize(("names", "expected"), NAMES.values(), ids=NAMES)
def test_names(names, expected):
    assert storable_names(names) == (expected or names)


def test_names_that_are_taken():
    assert storable_names(["B", "t"], taken=["T", "x"]) == ["B", "1: t"]


def write_and_read(adata: ad.AnnData, folder: Path) -> list[ad.AnnData]:
    """As users do, in each format; not what comes to us but what they have is compared."""
    adata.write_h5ad(folder / "cells.h5ad")
    adata.write_zarr(folder / "cells.zarr")
    return [ad.read_h5ad(folder / "cells.h5ad"), ad.read_zarr(folder / "cells.zarr")]


def test_files_hold_these_names(tmp_path):
    """All of them in one table, as each write of a store takes its time."""
    names = [name for given, _ in NAMES.values() for name in given]
    adata = simulated(12)
    values = np.arange(12 * len(names)).reshape(12, -1)
    adata.obsm["soft"] = pd.DataFrame(values, adata.obs_names, storable_names(names))
    for again in write_and_read(adata, tmp_path):
        pd.testing.assert_frame_equal(again.obsm["soft"], adata.obsm["soft"])
        np.testing.assert_array_equal(again.obsm["soft"], values)


def test_the_case_of_a_name_may_be_lost():
    """No two names become one in a file system that does not tell case."""
    stored = storable_names(["CD4", "cd4", "Cd4", "straße", "STRASSE"])
    assert len({name.casefold() for name in stored}) == len(stored) == 5


# ---- annotate -----------------------------------------------------------------------------------

LABELS = (  # that setup_anndata takes for types
    *("CD4/CD8 T", "CD4", "/x", "T/NK", "T|NK", "T", "t", "a/..", "x/", "_index", "__x"),
    *("zarr.json", ".zgroup", ".zarray", LONG, LONG + "y", "é" * 200, "β", "e\u0301", "\u00e9"),
    *("[T]", "%2F", "a\\b:c*?", "3", "1.5", "True"),
)


def labelled(types: Sequence) -> ad.AnnData:
    """Cells of these types, a few of them unlabelled."""
    adata = simulated()
    shown = [*(types * 120)[:110], *["Unknown"] * 10]
    adata.obs["cell_type"] = pd.Categorical(shown)
    return adata


def annotated(adata: ad.AnnData) -> ad.AnnData:
    """By a model that was not trained: what is written does not depend on it."""
    model = as_they_are(small_model(adata))
    model.training_settings = {"validation_size": None, "a/b": (1, "x"), "": np.float32(0.5)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a file takes other names")
        return model.annotate()


def check_written(adata: ad.AnnData, folder: Path) -> None:
    """All that we added comes back, from each format, under its own name."""
    ours = adata.uns["pyro_scanvi"]
    for again in write_and_read(adata, folder):
        predicted = again.obs["scanvi_prediction"]
        assert list(predicted) == list(adata.obs["scanvi_prediction"])
        classes = again.uns["pyro_scanvi"]["setup"]["classes"]
        assert list(classes) == list(ours["setup"]["classes"])
        assert list(classes) == list(predicted.cat.categories)
        soft = again.obsm["scanvi_probabilities"]
        pd.testing.assert_frame_equal(soft, adata.obsm["scanvi_probabilities"])
        np.testing.assert_array_equal(classes[soft.to_numpy().argmax(1)], predicted.to_numpy())
        np.testing.assert_array_equal(again.obs["scanvi_confidence"], soft.max(axis=1))
        np.testing.assert_array_equal(again.obsm["X_scanvi"], adata.obsm["X_scanvi"])
        for part in ("settings", "final_losses"):
            assert again.uns["pyro_scanvi"][part] == ours[part]


@pytest.mark.filterwarnings("ignore:.*differ in case or blanks:UserWarning")
def test_any_label(tmp_path):
    adata = annotated(labelled(LABELS))
    assert set(adata.obs["scanvi_prediction"].cat.categories) == set(LABELS)
    check_written(adata, tmp_path)


def test_labels_of_several_types(tmp_path):
    adata = annotated(labelled((1, "T", 2.5)))
    del adata.obs["cell_type"]  # the user's own, which no file holds
    check_written(adata, tmp_path)


DTYPES = {
    "nullable integers": ((1, 2, 3), "Int64"),
    "nullable floats": ((0.5, 1.5, 2.5), "Float64"),
    "nullable booleans": ((True, False, True), "boolean"),
    "strings": (("B", "NK", "T"), "string"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("values", "dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.filterwarnings("ignore:'Unknown' does not occur:UserWarning")
@pytest.mark.filterwarnings("ignore:.*inferred:FutureWarning")
def test_any_type_of_label(tmp_path, values, dtype):
    adata = simulated()
    names = dict(zip(("B", "NK", "T"), values, strict=True))
    adata.obs["cell_type"] = adata.obs["truth"].map(names).astype(dtype)
    adata = annotated(adata)
    del adata.obs["cell_type"]  # the user's own, of a type that not all writers take
    check_written(adata, tmp_path)


@pytest.mark.parametrize("name", mostly_slow(["B", "t|nk", "a name"]))
def test_any_name_of_the_index(tmp_path, name):
    """A class of that name gives way: no table can have both."""
    adata = labelled(("B", "T/NK", "cell"))
    adata.obs_names.name = name
    check_written(annotated(adata), tmp_path)
    assert adata.obs_names.name == name


@pytest.mark.parametrize("name", ["scanvi_prediction", "scanvi_confidence"])
def test_an_index_that_is_named_as_we_name_a_column(tmp_path, name):
    adata = simulated()
    adata.obs_names.name = name
    before = adata.obs_names.copy()
    with pytest.warns(UserWarning, match="index of obs had the name of a column"):
        annotated(adata)
    check_written(adata, tmp_path)
    assert adata.obs_names.name is None and before.name == name
    assert list(adata.obs_names) == list(before)


def test_an_index_of_numbers(tmp_path):
    adata = simulated()
    adata.obs_names = [str(i) for i in range(adata.n_obs)]
    check_written(annotated(adata), tmp_path)


def test_every_column_and_setting(tmp_path):
    """Of a set-up with all that there is, trained."""
    adata = simulated()
    rng = np.random.default_rng(0)
    adata.obs["a batch"] = rng.choice(["x/y", "x"], 120)
    adata.obs["donor"] = pd.Categorical(rng.choice([1, 2], 120))
    adata.obs["age"] = rng.normal(size=120)
    adata.layers["counts"] = adata.X.copy()
    model = type(small_model(simulated()))
    model.setup_anndata(
        adata,
        "cell_type",
        "Unknown",
        layer="counts",
        batch_key="a batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    for again in write_and_read(adata, tmp_path):
        np.testing.assert_equal(again.uns["pyro_scanvi"], adata.uns["pyro_scanvi"])
    trained = model(adata, n_hidden=8, n_latent=4).train(
        2, pretrain_epochs=1, progress_bar=False, early_stopping=True
    )
    check_written(trained.annotate(), tmp_path)
    last = trained.history.query("split == 'train'")["elbo"].iloc[-1]
    assert adata.uns["pyro_scanvi"]["final_losses"]["train"]["elbo"] == last


def test_the_warning_names_what_is_called_otherwise():
    model = as_they_are(small_model(labelled(("CD4/CD8 T", "B", "NK"))))
    with pytest.warns(UserWarning, match=r"'CD4/CD8 T' is 'CD4\|CD8 T'\)") as caught:
        model.annotate()
    assert Path(caught[0].filename) == Path(__file__)
    model = as_they_are(small_model(simulated()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.annotate()


# ---- settings -----------------------------------------------------------------------------------


def test_settings():
    """None, tuples and what numpy makes of a number are plain; keys are names."""
    found = storable({"a/b": None, "n": np.int64(3), "x": (1, 2), "y": {"T/": True}, "z": 0.5})
    assert found == {"a|b": "None", "n": 3, "x": "(1, 2)", "y": {"T|": True}, "z": 0.5}
    assert type(found["n"]) is int


def test_what_is_tested():
    """To be read in the log of a run under another version."""
    assert int(version("anndata").split(".")[1]) >= 12

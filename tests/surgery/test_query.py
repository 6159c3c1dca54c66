"""New data on a trained reference: genes, categories, labels; what is refused; what is learned."""

import copy
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_matrix, csr_matrix, issparse
from torch import nn

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data.minibatches import library_prior
from pyro_scanvi.storage import models
from tests.examples import SMALL, as_they_are, simulated
from tests.surgery.test_growing import BatchPi, BatchShift, LearnedPi

PROFILES = np.random.default_rng(7).normal(size=(4, 20))
KINDS = np.array(["B", "NK", "T", "New"])
REFERENCE_BATCHES = ("one", "two")


def cohort(batch, n=90, kinds=3, seed=0, shown=0.5):
    """Cells of some types in batches that shift some genes; truth in obs["truth"]."""
    rng = np.random.default_rng(seed)
    kind, place = np.arange(n) % kinds, np.resize(batch, n)
    shifts = {b: 0.3 * np.random.default_rng(len(b)).normal(size=20) for b in set(batch)}
    log_mean = 1.4 + 1.2 * PROFILES[kind] + np.array([shifts[b] for b in place])
    x = rng.poisson(np.exp(log_mean)).astype(np.float32)
    x[:, 0] += 1  # no empty cell
    truth = KINDS[kind]
    label = np.where(rng.random(n) < shown, truth, "Unknown")
    obs = pd.DataFrame(
        {"cell_type": label, "truth": truth, "batch": place, "donor": np.resize(["a", "b"], n)},
        index=[f"cell{i}" for i in range(n)],
    )
    return ad.AnnData(x, obs, pd.DataFrame(index=[f"gene{i}" for i in range(20)]))


def model_of(adata, epochs=0, batch_key="batch", **arguments):
    """A small model of a cohort."""
    SCANVI.setup_anndata(
        adata, "cell_type", "Unknown", batch_key=batch_key, categorical_covariate_keys=["donor"]
    )
    model = SCANVI(adata, **(SMALL | arguments))
    return model.train(epochs, batch_size=32, progress_bar=False)


@pytest.fixture(scope="module")
def reference():
    """Trained on two batches; the tests only read it."""
    arguments = {"encode_covariates": True, "linear_classifier": True}
    return model_of(cohort(REFERENCE_BATCHES, n=120), 30, **arguments)


@pytest.fixture
def query():
    return cohort(["three"], seed=1, shown=0)


# ---- prepare_query_anndata ----------------------------------------------------------------------


def shuffled(adata, kept, extra=3, seed=0):
    """The first `kept` genes and some that the reference lacks, in a random order."""
    more = ad.AnnData(
        np.ones((adata.n_obs, extra), dtype=np.float32),
        adata.obs[[]],
        pd.DataFrame(index=[f"other{i}" for i in range(extra)]),
    )
    both = ad.concat([adata[:, :kept], more], axis=1, merge="same")
    both.obs = adata.obs.copy()
    return both[:, np.random.default_rng(seed).permutation(both.n_vars)].copy()


@pytest.mark.parametrize("form", [np.asarray, csr_matrix, csc_matrix])
def test_genes_are_put_in_order_and_filled(reference, query, form):
    """As pandas reindexes, in X and in every layer; dtypes stay, sparse matrices too."""
    adata = shuffled(query, kept=18)
    dense = adata.to_df()
    adata.layers["double"] = form((2 * dense.to_numpy()).astype(np.int32))
    adata.X = form(dense.to_numpy())
    found = SCANVI.prepare_query_anndata(adata, reference)
    genes = [f"gene{i}" for i in range(20)]
    expected = dense.reindex(columns=genes, fill_value=np.float32(0))
    pd.testing.assert_frame_equal(found.to_df(), expected)
    doubled = found.to_df(layer="double")
    pd.testing.assert_frame_equal(doubled, (2 * expected).astype(np.int32))
    for matrix in (found.X, found.layers["double"]):
        assert issparse(matrix) == (form is not np.asarray)
        assert not issparse(matrix) or (matrix.format == "csr" and matrix.has_canonical_format)
    assert list(found.var["in_query"]) == [i < 18 for i in range(20)]


def test_all_but_the_genes_is_kept(reference, query):
    """In copies: neither AnnData sees what is done to the other."""
    query.obsm["place"] = np.arange(180.0).reshape(90, 2)
    query.obsp["near"] = csr_matrix(np.eye(90))
    query.uns["note"] = {"inner": [1, 2]}
    adata = shuffled(query, kept=20)
    adata.obsm, adata.obsp, adata.uns = query.obsm, query.obsp, query.uns
    before = adata.copy()
    found = SCANVI.prepare_query_anndata(adata, reference)
    pd.testing.assert_frame_equal(found.obs, before.obs)
    np.testing.assert_array_equal(found.obsm["place"], before.obsm["place"])
    assert (found.obsp["near"] != before.obsp["near"]).nnz == 0
    assert found.uns["note"] == before.uns["note"]
    found.X[:], found.obs["batch"], found.obsm["place"][:] = 7, "x", 7
    found.uns["note"]["inner"].append(3)
    np.testing.assert_array_equal(adata.X, before.X)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.obsm["place"], before.obsm["place"])
    assert adata.uns["note"] == {"inner": [1, 2]}


def test_prepared_cells_are_read(reference, query):
    """A query whose genes are shuffled gets the predictions of one whose genes are not."""
    found = SCANVI.prepare_query_anndata(shuffled(query, kept=20), reference)
    expected = SCANVI.load_query_data(query, reference).predict(soft=True)
    assert SCANVI.load_query_data(found, reference).predict(soft=True).equals(expected)


def test_a_layer_of_counts(query):
    """X may be something else, or nothing."""
    adata = cohort(REFERENCE_BATCHES)
    adata.layers["counts"], adata.X = adata.X, None
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", layer="counts")
    model = SCANVI(adata, n_hidden=8)
    query.layers["counts"] = query.X.copy()
    query.X = None
    found = SCANVI.prepare_query_anndata(query[:, ::-1].copy(), model)
    assert found.X is None
    np.testing.assert_array_equal(found.layers["counts"], query.layers["counts"])
    del query.layers["counts"]
    with pytest.raises(InputError, match="no layer 'counts'"):
        SCANVI.prepare_query_anndata(query, model)


@pytest.fixture(scope="module")
def hundred_genes():
    """A model of 100 genes."""
    adata = simulated(n_genes=100)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    return SCANVI(adata, n_hidden=8)


@pytest.mark.parametrize("there, warns", [(79, True), (80, False), (81, False), (1, True)])
def test_few_shared_genes_are_warned_of(hundred_genes, there, warns):
    adata = simulated(n_genes=100)[:, :there].copy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SCANVI.prepare_query_anndata(adata, hundred_genes)
    assert len(caught) == warns
    if warns:
        assert f"{100 - there} of the reference's 100 genes are missing" in str(caught[0].message)
        assert caught[0].filename == __file__


def test_no_shared_gene(reference, query):
    query.var_names = query.var_names.str.upper()
    with pytest.raises(InputError, match="none of the reference's 20 genes .gene0, gene1"):
        SCANVI.prepare_query_anndata(query, reference)


def test_the_names_of_the_genes(reference, query):
    names = SCANVI.prepare_query_anndata(query, reference, return_reference_var_names=True)
    assert isinstance(names, pd.Index) and list(names) == [f"gene{i}" for i in range(20)]


# ---- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"use_observed_lib_size": False}])
def test_a_folder_is_a_reference_too(query, tmp_path, arguments):
    """Without its cells; all answers are those with the model itself."""
    model = model_of(cohort(REFERENCE_BATCHES), 1, y_prior=[0.5, 0.3, 0.2], **arguments)
    model.save(tmp_path / "reference")
    found = SCANVI.load_query_data(query.copy(), str(tmp_path / "reference"))
    expected = SCANVI.load_query_data(query.copy(), model)
    assert found.predict(soft=True).equals(expected.predict(soft=True))
    assert found.freeze == expected.freeze and found.seed == expected.seed
    assert found.state_diff(tmp_path / "reference").equals(expected.state_diff(model))
    np.testing.assert_array_equal(
        SCANVI.prepare_query_anndata(query, tmp_path / "reference").X, query.X
    )


def test_a_folder_of_ones_own_class_is_a_reference_too(tmp_path):
    """To the bit as the model itself; neither the genes nor the proof ask for the class."""
    reference = model_of(cohort(REFERENCE_BATCHES), 1, module_class=LearnedPi, rarer=0.5)
    folder = tmp_path / "reference"
    reference.save(folder)
    again = SCANVI.load(folder, cohort(REFERENCE_BATCHES), module_class=LearnedPi)
    queries = []
    for source in (reference, folder, again):
        adata = SCANVI.prepare_query_anndata(cohort(["three", "two"], kinds=4, seed=1), source)
        model = SCANVI.load_query_data(adata, source, module_class=LearnedPi, extend_labels=["New"])
        assert type(model.module) is LearnedPi and model.vae_arguments["rarer"] == 0.5
        queries.append(model.train(1, batch_size=32, progress_bar=False))
    first = queries[0].module.state_dict()
    for model in queries[1:]:
        for name, tensor in model.module.state_dict().items():
            assert torch.equal(tensor, first[name]), name
        assert model.state_diff(folder).equals(queries[0].state_diff(reference))


def test_a_parameter_of_ones_own_is_frozen_as_ours_are():
    """Its old entries to the bit, and that of the new label moves; weight decay or not."""
    reference = model_of(cohort(REFERENCE_BATCHES), 1, module_class=LearnedPi)
    model = SCANVI.load_query_data(
        cohort(["one", "two"], kinds=4, seed=1), reference, extend_labels=["New"]
    )
    before = model.module.log_pi.detach().clone()
    model.train(2, batch_size=32, plan_kwargs={"weight_decay": 0.1}, progress_bar=False)
    row = model.state_diff(reference).set_index("name").loc["log_pi"]
    assert (row.entries, row.new, row.trainable, row.changed) == (4, 1, 1, 0)
    assert torch.equal(model.module.log_pi[:3], reference.module.log_pi)
    assert model.module.log_pi[3] != before[3]


def test_a_matrix_that_grew_on_two_axes_is_frozen_but_for_what_is_new(tmp_path):
    """Opened from a folder and trained on: the old 2 x 3 entries stay to the bit."""
    reference = model_of(cohort(REFERENCE_BATCHES), 1, module_class=BatchPi)
    cells = cohort(["two", "three"], kinds=4, seed=1)
    query = SCANVI.load_query_data(cells.copy(), reference, extend_labels=["New"])
    query.save(tmp_path / "query")
    model = SCANVI.load(tmp_path / "query", cells, module_class=BatchPi)
    model.train(1, batch_size=32, plan_kwargs={"weight_decay": 0.1}, progress_bar=False)
    row = model.state_diff(reference).set_index("name").loc["log_pi"]
    assert (row.entries, row.new, row.trainable, row.changed) == (12, 6, 6, 0)
    found, before = model.module.log_pi, query.module.log_pi
    assert torch.equal(found[:2, :3], reference.module.log_pi)
    assert (found[2] != before[2]).all() and (found[:2, 3] != before[:2, 3]).any()


def test_old_records_are_references_too(query, tmp_path, monkeypatch):
    """As versions before wrote them: of trained models only, of one class, counts in X."""
    model = as_they_are(model_of(cohort(REFERENCE_BATCHES)))
    write, later = models.write_model, ("is_trained", "freeze", "module_class")

    def write_as_before(directory, state, record, adata, *_, **__):
        del record["fields"]["use_raw"]
        write(directory, state, {k: v for k, v in record.items() if k not in later}, adata)

    monkeypatch.setattr(models, "write_model", write_as_before)
    model.save(tmp_path / "old")
    opened = SCANVI.load(tmp_path / "old", cohort(REFERENCE_BATCHES))
    assert opened.is_trained and opened.freeze is None and not opened.fields.use_raw
    by = {"soft": True, "method": "classifier"}  # there were no rules of labels
    assert opened.predict(soft=True).equals(model.predict(**by))
    found = SCANVI.load_query_data(query.copy(), tmp_path / "old")
    expected = SCANVI.load_query_data(query.copy(), model)
    assert found.predict(soft=True).equals(expected.predict(**by))


def test_the_class_of_a_folder_is_asked_for(query, tmp_path):
    model_of(cohort(REFERENCE_BATCHES), module_class=LearnedPi).save(tmp_path / "own")
    with pytest.raises(InputError, match="saved from a LearnedPi.*module_class=LearnedPi"):
        SCANVI.load_query_data(query, tmp_path / "own")
    assert "pyro_scanvi" not in query.uns


def test_a_query_that_is_refused_leaves_the_cells_as_they_were(query):
    """Where a parameter cannot grow, the setup that the AnnData had stands again."""
    reference = model_of(cohort(REFERENCE_BATCHES), module_class=BatchShift)
    for setup in ({}, {"setup": {"note": 1}}):
        query.uns = {"pyro_scanvi": setup} if setup else {}
        with pytest.raises(InputError, match="shift has shape"):
            SCANVI.load_query_data(query, reference)
        assert dict(query.uns) == ({"pyro_scanvi": setup} if setup else {})


def test_a_model_of_scvi_tools_is_a_reference_too():
    """Its known cells are answered as before; a batch that scvi-tools never saw is read."""
    folder = Path(__file__).parent.parent / "reference" / "saved_scanvi"
    stored = np.load(folder / "expected.npz")
    obs = pd.DataFrame(
        {
            "batch": np.array(["b0", "b1", "b2"])[stored["batch"]],
            "sex": np.array(["f", "m"])[stored["sex"]],
        },
        index=[f"cell {i}" for i in range(48)],
    )
    adata = ad.AnnData(stored["X"], obs, pd.DataFrame(index=[str(i) for i in range(40)]))
    reference = SCANVI.load_scvi_tools(folder, adata.copy())
    adata.obs.loc[adata.obs_names[:5], "batch"] = "b9"
    model = SCANVI.load_query_data(adata, reference)
    soft = model.predict(soft=True).iloc[5:]
    np.testing.assert_allclose(soft, stored["probabilities"][5:], atol=1e-4)
    assert list(model.fields.batches)[-1] == "b9"
    assert not model.state_diff(reference).changed.any()


def test_bad_references(reference, query, tmp_path):
    reference.save(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.json").write_text("{")
    cases = {
        "expected a SCANVI": reference.module,
        "there is no model.json": tmp_path / "nowhere",
        "damaged": tmp_path / "damaged",
    }
    for message, bad in cases.items():
        for call in (SCANVI.load_query_data, SCANVI.prepare_query_anndata):
            with pytest.raises(InputError, match=message):
                call(query, bad)
    assert "pyro_scanvi" not in query.uns


def test_the_reference_is_not_touched(reference, query):
    state, fields = copy.deepcopy(reference.module.state_dict()), reference.fields
    uns, settings = copy.deepcopy(reference.adata.uns), dict(reference.training_settings)
    model = SCANVI.load_query_data(query, reference, unfrozen=True)
    model.train(1, batch_size=32, progress_bar=False)
    for name, tensor in reference.module.state_dict().items():
        assert tensor.equal(state[name]), name
    assert reference.fields is fields and reference.training_settings == settings
    assert list(reference.adata.uns["pyro_scanvi"]["setup"]["batches"]) == list(
        uns["pyro_scanvi"]["setup"]["batches"]
    )
    assert all(p.requires_grad for p in reference.module.parameters())


class Scaled(nn.Module):
    """A positive function with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (self.scale + x).exp()


def test_modules_among_the_arguments_are_not_shared(query):
    reference = model_of(cohort(REFERENCE_BATCHES), var_activation=Scaled())
    model = SCANVI.load_query_data(query, reference, unfrozen=True)
    model.train(1, batch_size=32, progress_bar=False)
    scales = [m.module.z_encoder.var_activation.scale.item() for m in (reference, model)]
    assert scales[0] == 0 != scales[1]


# ---- categories ---------------------------------------------------------------------------------


def test_cells_of_old_batches_are_answered_as_before(reference):
    """Predictions and cell states; the query has a new batch and a new donor beside them."""
    adata = cohort(["one", "three", "two"], seed=2)
    adata.obs["donor"] = np.resize(["a", "c", "b"], 90)
    model = SCANVI.load_query_data(adata, reference)
    assert list(model.fields.batches) == ["one", "two", "three"]
    assert [list(c) for c in model.fields.covariate_categories] == [["a", "b", "c"]]
    known = adata[adata.obs["batch"] != "three"].copy()
    pd.testing.assert_frame_equal(
        model.predict(known, soft=True), reference.predict(known, soft=True), rtol=1e-5
    )
    np.testing.assert_allclose(
        model.get_latent_representation(known),
        reference.get_latent_representation(known),
        atol=1e-5,
    )


def test_a_plain_model_says_what_makes_new_categories(reference, query):
    with pytest.raises(InputError, match="1 batches .*three.*load_query_data"):
        reference.predict(query)
    query.obs["batch"], query.obs["donor"] = "one", "c"
    with pytest.raises(InputError, match="1 categories .*c.*load_query_data"):
        reference.predict(query)


def test_new_categories_may_be_refused(reference, query):
    with pytest.raises(InputError, match="1 batches that the model has not seen .three."):
        SCANVI.load_query_data(query, reference, extend_categories=False)
    assert "pyro_scanvi" not in query.uns
    query.obs["batch"] = "one"
    model = SCANVI.load_query_data(query, reference, extend_categories=False)
    assert model.module.n_batch == 2


def test_missing_genes_and_columns_are_named(reference, query):
    with pytest.raises(InputError, match="2 of 20 are missing.*prepare_query_anndata"):
        SCANVI.load_query_data(query[:, 2:].copy(), reference)
    del query.obs["donor"]
    with pytest.raises(InputError, match="no column 'donor'"):
        SCANVI.load_query_data(query, reference)


def test_the_labels_may_be_missing(reference, query):
    expected = SCANVI.load_query_data(query.copy(), reference).predict(soft=True)
    del query.obs["cell_type"]
    model = SCANVI.load_query_data(query, reference)
    assert model.predict(soft=True).equals(expected)
    model.train(1, progress_bar=False)


def test_without_a_batch_key_there_is_no_new_batch(query):
    model = SCANVI.load_query_data(query, model_of(cohort(REFERENCE_BATCHES), batch_key=None))
    assert model.module.n_batch == 1 and not model.freeze.new


def test_the_library_of_a_new_batch_is_that_of_the_query(query):
    """Old batches keep theirs, whatever their cells in the query have."""
    arguments = {"use_observed_lib_size": False}
    reference = model_of(cohort(REFERENCE_BATCHES), **arguments)
    query.obs["batch"] = np.resize(["three", "one"], 90)
    model = SCANVI.load_query_data(query, reference)
    log_library = np.log(query.X[::2].sum(1))
    found = model.module.library_log_means, model.module.library_log_vars
    expected = log_library.mean(), log_library.var()
    np.testing.assert_allclose([v[2].item() for v in found], expected, rtol=1e-5)
    of_reference = library_prior(reference._data, 2)
    for value, before in zip(found, of_reference, strict=True):
        np.testing.assert_array_equal(value[:2], before.astype(np.float32))


def test_a_query_of_a_query(reference, query):
    """Its reference is the first query model: the batch that was new there is frozen now."""
    first = SCANVI.load_query_data(query, reference, freeze_batchnorm_decoder=True)
    first.train(1, batch_size=32, progress_bar=False)
    later = cohort(["four", "three"], seed=3, shown=0)
    second = SCANVI.load_query_data(later, first, freeze_batchnorm_decoder=True)
    second.train(2, batch_size=32, progress_bar=False, plan_kwargs={"weight_decay": 0.1})
    assert list(second.fields.batches) == ["one", "two", "three", "four"]
    for before in (first, reference):
        diff = second.state_diff(before)
        assert not diff.changed.any()
        assert diff.new.sum() == 16 * 2 * (1 if before is first else 2)


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, message",
    [
        (["T"], "'T' is a label of the reference"),
        (["New", "New"], "'New' is named twice"),
        (["Unknown"], "'Unknown' is the unlabelled category"),
        ("New", r"expected a list: \['New'\]"),
    ],
)
def test_bad_new_labels(reference, query, labels, message):
    with pytest.raises(InputError, match=message):
        SCANVI.load_query_data(query, reference, extend_labels=labels)


def test_unknown_labels_must_be_named(reference):
    with pytest.raises(InputError, match="1 labels .*New.*extend_labels"):
        SCANVI.load_query_data(cohort(["three"], kinds=4), reference)


def test_labels_that_nothing_teaches_are_warned_of(reference, query):
    with pytest.warns(UserWarning, match="no cell of the query is labelled New"):
        model = SCANVI.load_query_data(query, reference, extend_labels=["New"])
    assert not (model.predict() == "New").any()


def test_new_labels_without_known_ones_are_warned_of(reference, query):
    """Nothing tells them apart."""
    query.obs["cell_type"] = query.obs["cell_type"].astype(str)
    query.obs.loc[query.obs_names[0], "cell_type"] = "New"
    with pytest.warns(UserWarning, match="nothing tells the new labels from the known ones"):
        SCANVI.load_query_data(query, reference, extend_labels=["New"])


def test_groups_of_labels(query):
    """They stay with new batches; the group of a new label is not known."""
    groups = {"labels_groups": [0, 1, 1], "use_labels_groups": True}
    reference = model_of(cohort(REFERENCE_BATCHES), **groups)
    assert SCANVI.load_query_data(query, reference).module.n_batch == 3
    query.obs.loc[query.obs_names[:2], "cell_type"] = ["New", reference.fields.classes[0]]
    with pytest.raises(InputError, match="extend_labels cannot be used with labels_groups"):
        SCANVI.load_query_data(query, reference, extend_labels=["New"])


def test_the_prior_of_labels_survives_a_save(tmp_path):
    """Given to the reference; grown; as an argument of the saved model too."""
    reference = as_they_are(model_of(cohort(REFERENCE_BATCHES), y_prior=[0.5, 0.3, 0.2]))
    adata = cohort(["three"], kinds=4)
    model = SCANVI.load_query_data(adata, reference, extend_labels=["New"])
    np.testing.assert_allclose(model.module.y_prior, [0.375, 0.225, 0.15, 0.25], rtol=1e-6)
    model.save(tmp_path / "query")
    again = SCANVI.load(tmp_path / "query", adata)
    assert again.module.y_prior.equal(model.module.y_prior)
    assert again.predict(soft=True).equals(model.predict(soft=True))


@pytest.mark.parametrize("flags", [{}, {"freeze_classifier": False, "freeze_expression": False}])
@pytest.mark.slow
def test_a_new_label_is_learned(reference, flags):
    """With some cells of a new type labelled, it is found in hidden ones; old rows stay.

    Nothing but rows and columns of the new label (and decoder norms) moves where all is frozen.
    Chance is 1/4; three seeds of the data gave 0.82 to 1.
    """
    adata = cohort(["three"], n=160, kinds=4, seed=1, shown=0.4)
    model = SCANVI.load_query_data(adata, reference, extend_labels=["New"], **flags)
    assert list(model.fields.classes) == ["B", "NK", "T", "New"]
    model.train(25, batch_size=32, plan_kwargs={"lr": 0.05}, progress_bar=False)
    hidden = (adata.obs["cell_type"] == "Unknown").to_numpy()
    new = (adata.obs["truth"] == "New").to_numpy()
    correct = model.predict() == adata.obs["truth"].to_numpy()
    assert correct[hidden & new].mean() > 0.75 and correct[hidden & ~new].mean() > 0.75
    diff = model.state_diff(reference).set_index("name")
    classifier = diff.filter(like="classifier", axis=0)
    assert (classifier.changed == 0).all() == (not flags)
    assert (classifier.new > 0).all()


# ---- what it is good for ------------------------------------------------------------------------


def test_types_are_found_in_a_new_batch(reference, query):
    """Right away, and after training; chance is 1/3."""
    model = SCANVI.load_query_data(query, reference)
    truth = query.obs["truth"].to_numpy()
    assert (model.predict() == truth).mean() > 0.9
    model.train(5, batch_size=32, progress_bar=False)
    assert (model.predict() == truth).mean() > 0.9


def test_training_raises_the_bound(reference, query):
    """The decoder learns the new batch; nats per cell of the held-out cells."""
    model = SCANVI.load_query_data(query, reference, freeze_batchnorm_decoder=True)
    model.train(8, batch_size=32, plan_kwargs={"lr": 0.03}, progress_bar=False)
    elbo = model.history.query("split == 'validation'").elbo
    assert elbo.iloc[-1] > elbo.iloc[0] + 0.5


def test_predictions_are_those_of_the_reference_unless_encoder_or_classifier_move(query):
    """Without covariates in the encoder training teaches the decoder alone."""
    reference = model_of(cohort(REFERENCE_BATCHES), 5)
    model = SCANVI.load_query_data(query.copy(), reference)
    before = model.predict(soft=True)
    model.train(2, batch_size=32, progress_bar=False)
    assert model.predict(soft=True).equals(before)
    other = query.copy()
    other.obs["batch"] = "one"
    np.testing.assert_array_equal(before, reference.predict(other, soft=True))


def test_seeds(reference, query):
    """That of the reference unless given; it is that of training."""
    assert SCANVI.load_query_data(query, reference).seed == reference.seed
    assert SCANVI.load_query_data(query, reference, seed=5).seed == 5
    with pytest.raises(ValueError, match="seed=-1"):
        SCANVI.load_query_data(query, reference, seed=-1)

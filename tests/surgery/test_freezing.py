"""What is frozen does not change by one bit; what a flag thaws moves, and nothing else."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from pyro_scanvi import SCANVI, InputError, SemiSupervisedELBO
from pyro_scanvi.model.networks import BatchNorm
from pyro_scanvi.storage import models
from pyro_scanvi.surgery.freezing import Freeze, KeepFrozen, frozen, state_diff, trainable
from tests.examples import SIZES, enlarged, random_cells, simulated, small_vae

PLAN = {"weight_decay": 0.1, "lr": 0.01}
LATENT_LIBRARY = {"use_observed_lib_size": False}
DECODER_NORMS = r"[xz]_decoder\..*batch_norm\."
ALL_FROZEN = {"freeze_batchnorm_decoder": True}


def cells_of(batches, seed=0, n=48, donors=("a", "b")):
    """Simulated cells with a batch and a donor."""
    adata = simulated(n=n, seed=seed)
    adata.obs["batch"] = np.resize(batches, n)
    adata.obs["donor"] = np.resize(donors, n)
    return adata


def reference_of(batches=("one", "two"), **arguments):
    """A model after one epoch, so that no statistics are as they were born."""
    adata = cells_of(batches)
    SCANVI.setup_anndata(
        adata, "cell_type", "Unknown", batch_key="batch", categorical_covariate_keys=["donor"]
    )
    sizes = {"n_hidden": 8, "n_latent": 4, "dropout_rate": 0.2}
    model = SCANVI(adata, **(sizes | arguments))
    return model.train(1, batch_size=16, progress_bar=False)


@pytest.fixture(scope="module")
def reference():
    """With covariates in the encoder and a latent library, so that every network is there."""
    return reference_of(encode_covariates=True, n_layers=2, **LATENT_LIBRARY)


def queried(reference, **arguments):
    """A model of a third batch, some of whose cells are of a new type."""
    adata = cells_of(["three", "two"], seed=1)
    if "extend_labels" in arguments:
        adata.obs.loc[adata.obs_names[::4], "cell_type"] = arguments["extend_labels"][0]
    return SCANVI.load_query_data(adata, reference, **arguments)


def trained(model, epochs=2):
    return model.train(epochs, batch_size=16, plan_kwargs=PLAN, progress_bar=False)


def moved(model, reference):
    """Names of the tensors of which old entries changed."""
    diff = model.state_diff(reference)
    return set(diff.name[diff.changed > 0])


# ---- models x laws ------------------------------------------------------------------------------

MODELS = {
    "plain": {},
    "encoder, deep": {"encode_covariates": True, "n_layers": 2, **LATENT_LIBRARY},
    "shallow": {"deeply_inject_covariates": False, "n_layers": 2, "encode_covariates": True},
    "embedding": {"batch_representation": "embedding", "encode_covariates": True},
    "gene-batch": {"dispersion": "gene-batch", "linear_classifier": True},
    "gene-label": {"dispersion": "gene-label", "gene_likelihood": "nb"},
    "no norms": {"use_batch_norm": "none", "n_layers": 0},
}


@pytest.mark.parametrize("batches", [("one", "two"), ("two",)], ids=["two batches", "one batch"])
@pytest.mark.parametrize("name", MODELS)
def test_only_new_entries_move(name, batches):
    """Weight decay and dropout: not one bit of an old entry differs; new ones do everywhere."""
    if len(batches) == 1:
        with pytest.warns(UserWarning, match="one value"):
            reference = reference_of(batches, **MODELS[name])
    else:
        reference = reference_of(batches, **MODELS[name])
    labels = {"extend_labels": ["New"]} if "gene-label" in name or name == "plain" else {}
    model = queried(reference, **ALL_FROZEN, **labels)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    diff = trained(model).state_diff(reference).set_index("name")
    prior = ["y_prior"] if labels else []  # rescaled, as its sum stays 1
    assert (diff.drop(index=prior).changed == 0).all()
    assert (diff.drop(index=prior).max_change == 0).all()
    learned = diff[diff.trainable > 0]
    assert (learned.trainable == learned.new).all()
    assert len(learned) and not any("batch_norm" in n for n in learned.index)
    for tensor in learned.index:
        now, mask = model.module.state_dict()[tensor], trainable(model.module, model.freeze)
        assert (now != before[tensor])[mask[tensor]].any(), tensor


def test_decoder_norms_move_by_default_and_nothing_else(reference):
    model = trained(queried(reference))
    found = moved(model, reference)
    assert found and all(re.match(DECODER_NORMS, name) for name in found)
    assert {name.rpartition(".")[2] for name in found} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


FLAGS = {
    "freeze_expression": r"[zl]_encoder\.hidden\.layers\.0\.linear\.",
    "freeze_decoder_first_layer": r"x_decoder\.hidden\.layers\.0\.linear\.",
    "freeze_batchnorm_encoder": r"[zlu]_encoder\..*batch_norm\.",
    "freeze_batchnorm_decoder": DECODER_NORMS,
    "freeze_classifier": r"classifier\.",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_thaws_what_it_names_and_nothing_else(reference, flag):
    model = queried(reference, **(ALL_FROZEN | {flag: False}))
    named = {n for n in reference.module.state_dict() if re.match(FLAGS[flag], n)}
    assert named
    assert moved(trained(model), reference) == named
    diff = model.state_diff(reference).set_index("name")
    thawed = diff.trainable == diff.entries
    assert set(diff.index[thawed]) >= named


def test_flags_name_first_layers_where_there_are_no_hidden_ones():
    """The heads read the input then."""
    vae = small_vae(n_batch=2, n_layers=0)
    freeze = frozen(
        vae, enlarged(vae, SIZES | {"n_layers": 0, "n_batch": 3}), freeze_expression=False
    )
    masks = trainable(small_vae(n_batch=3, n_layers=0), freeze)
    whole = {name for name, mask in masks.items() if mask.all() and "z_encoder" in name}
    assert whole == {f"z_encoder.{h}.{p}" for h in ("mean", "variance") for p in ("weight", "bias")}


def test_unfrozen_moves_everything(reference):
    model = trained(queried(reference, unfrozen=True, freeze_batchnorm_decoder=True))
    learned = dict(model.module.named_parameters())
    statistics = {n for n in model.module.state_dict() if "running" in n or "tracked" in n}
    assert moved(model, reference) == set(learned) | statistics


def test_dropout_is_frozen_or_not():
    """With it and the batch norms frozen, training mode encodes as evaluation does."""
    vae = small_vae(n_batch=2, encode_covariates=True, dropout_rate=0.5)
    arguments = SIZES | {"n_batch": 3, "encode_covariates": True, "dropout_rate": 0.5}
    cells = random_cells(vae)
    for freeze_dropout in (True, False):
        new = enlarged(vae, arguments)
        frozen(vae, new, freeze_dropout=freeze_dropout)
        expected = new.eval().q_z(cells).mean
        assert torch.equal(new.train().q_z(cells).mean, expected) == freeze_dropout


def test_a_thawed_classifier_keeps_its_dropout_frozen():
    vae = small_vae(dropout_rate=0.5)
    new = enlarged(vae, SIZES | {"dropout_rate": 0.5})
    frozen(vae, new, freeze_dropout=True, freeze_classifier=False)
    new.train().classifier(torch.randn(5, 4))
    dropouts = [m for m in new.classifier.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)


def test_frozen_batch_norms_stand_still_in_train_mode(reference):
    """Outside of Lightning too, whatever mode the model is put into."""
    model = queried(reference, **ALL_FROZEN)
    norms = [m for m in model.module.modules() if isinstance(m, BatchNorm)]
    before = copy.deepcopy([m.state_dict() for m in norms])
    model.module.train()
    cells = random_cells(model.module, n=16)
    SemiSupervisedELBO(model.module.q_y).loss(model.module.model, model.module.guide, cells)
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in norm.state_dict().items())


# ---- the optimiser ------------------------------------------------------------------------------

OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_any_optimiser(optimiser):
    """Those that would shrink frozen entries, and those that mix entries of a tensor."""
    old = small_vae(n_batch=2, encode_covariates=True)
    new = enlarged(old, SIZES | {"n_batch": 3, "encode_covariates": True})
    freeze = frozen(old, new, **ALL_FROZEN)
    steps = OPTIMISERS[optimiser]([p for p in new.parameters() if p.requires_grad])
    keep = KeepFrozen(new, freeze)
    keep.on_train_start(None, None)
    elbo, cells = SemiSupervisedELBO(new.q_y), random_cells(new)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(3):
            steps.zero_grad()
            elbo.loss_and_grads(new.model, new.guide, cells)
            steps.step()
            keep.on_train_batch_end(None, None)
    rows = {row["name"]: row for row in state_diff(new, old, freeze)}
    assert not any(row["changed"] for row in rows.values())
    start = enlarged(old, SIZES | {"n_batch": 3, "encode_covariates": True}).state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in new.state_dict().items())


def test_an_interrupted_step_is_mended():
    """The exception comes between the optimiser and the end of the minibatch."""
    old = small_vae(n_batch=2)
    new = enlarged(old, SIZES | {"n_batch": 3})
    freeze = frozen(old, new, **ALL_FROZEN)
    keep = KeepFrozen(new, freeze)
    keep.on_exception(None, None, KeyboardInterrupt())  # before the start
    keep.on_train_start(None, None)
    with torch.no_grad():
        new.x_decoder.hidden.layers[0].linear.weight.add_(1)
    keep.on_exception(None, None, KeyboardInterrupt())
    assert not any(row["changed"] for row in state_diff(new, old, freeze))


def test_callbacks_of_the_user_see_frozen_entries(reference):
    """Ours is the first of the callbacks."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *arguments):
            seen.extend(moved(model, reference))

    model = queried(reference, **ALL_FROZEN)
    model.train(1, batch_size=16, plan_kwargs=PLAN, callbacks=[Look()], progress_bar=False)
    assert not seen


def test_other_norms_and_modes_between_minibatches():
    """A model with a batch norm of torch's own, put into train mode after each minibatch."""
    old = small_vae()
    old.classifier.hidden.layers[0].batch_norm = nn.BatchNorm1d(8)
    new = copy.deepcopy(old)
    frozen(old, new)
    for _ in range(2):
        new.train().classifier(torch.randn(6, 4))
    norm = new.classifier.hidden.layers[0].batch_norm
    assert torch.equal(norm.running_mean, torch.zeros(8)) and norm.num_batches_tracked == 0


# ---- again, and again ---------------------------------------------------------------------------


def test_training_on_keeps_the_freeze(reference):
    model = trained(trained(queried(reference, **ALL_FROZEN), 1), 1)
    assert model.n_epochs_trained == 2 and not moved(model, reference)


def test_copies_keep_the_freeze(reference):
    model = copy.deepcopy(queried(reference, **ALL_FROZEN))
    assert not moved(trained(model), reference)


def test_saving_in_the_middle_changes_nothing(reference, tmp_path):
    """Train, save, load, train: as train, train, to the bit; frozen all the way."""
    model = trained(queried(reference, freeze_classifier=False), 1)
    model.save(tmp_path / "query")
    again = SCANVI.load(tmp_path / "query", cells_of(["three", "two"], seed=1))
    assert again.freeze == model.freeze
    whole, halves = trained(model, 1), trained(again, 1)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, halves.module.state_dict()[name]), name
    assert moved(halves, reference) == moved(whole, reference)
    assert not any(name.startswith("z_encoder") for name in moved(halves, reference))


def test_records_without_a_freeze_load(reference, tmp_path, monkeypatch):
    """As versions before wrote them."""
    write = models.write_model

    def write_as_before(directory, state, record, adata, *_, **__):
        write(directory, state, {k: v for k, v in record.items() if k != "freeze"}, adata)

    monkeypatch.setattr(models, "write_model", write_as_before)
    reference.save(tmp_path / "old")
    assert "freeze" not in json.loads((tmp_path / "old" / "model.json").read_text())
    model = SCANVI.load(tmp_path / "old", cells_of(["one", "two"]))
    assert model.freeze is None and moved(trained(model), reference)


def test_plain_models_have_nothing_frozen(reference, tmp_path):
    reference.save(tmp_path / "plain")
    assert SCANVI.load(tmp_path / "plain", reference.adata.copy()).freeze is None


def test_nothing_to_train_is_said():
    """Known batches, and all of the rest is frozen; nothing is trained, nothing recorded."""
    reference = reference_of()
    adata = cells_of(["one", "two"], seed=1)
    model = SCANVI.load_query_data(adata, reference, **ALL_FROZEN)
    with pytest.raises(InputError, match="nothing to train.*freeze_"):
        trained(model)
    assert model.n_epochs_trained == 0 and model.training_settings == {}


# ---- the proof ----------------------------------------------------------------------------------


def test_state_diff_has_a_row_for_each_tensor(reference):
    model = queried(reference)
    diff = model.state_diff(reference)
    state = model.module.state_dict()
    assert list(diff.name) == list(state)
    assert list(diff.entries) == [tensor.numel() for tensor in state.values()]
    sizes = [tensor.numel() for tensor in reference.module.state_dict().values()]
    assert list(diff.new) == (diff.entries - sizes).tolist()
    assert not diff.changed.any() and diff.trainable.sum() < 0.3 * diff.entries.sum()


@pytest.mark.parametrize("value", ["next", "minus zero"])
def test_state_diff_finds_a_single_bit(value):
    """The smallest change there is, and the sign of a zero."""
    old = small_vae(n_batch=2)
    weight = old.x_decoder.hidden.layers[0].linear.weight
    with torch.no_grad():
        weight[3, 1] = 0.0 if value == "minus zero" else 1.0
    new = enlarged(old, SIZES | {"n_batch": 3})
    changed = new.x_decoder.hidden.layers[0].linear.weight
    with torch.no_grad():
        changed[3, 1] = -0.0 if value == "minus zero" else float(np.nextafter(np.float32(1), 2))
        changed[0, -1] += 5  # a new entry
    rows = [row for row in state_diff(new, old, Freeze(new={})) if row["changed"]]
    assert [(row["name"], row["changed"]) for row in rows] == [
        ("x_decoder.hidden.layers.0.linear.weight", 1)
    ]
    assert rows[0]["max_change"] == pytest.approx(0 if value == "minus zero" else 2**-23)


def test_columns_of_a_variable_that_had_one_category_stay_zero():
    """The old category's column counts as an old entry: it may not move either."""
    old = small_vae(n_batch=1)
    new = enlarged(old, SIZES | {"n_batch": 2})
    freeze = frozen(old, new)
    name = "x_decoder.hidden.layers.0.linear.weight"
    mask = trainable(new, freeze)[name]
    assert mask[:, -1].all() and not mask[:, :-1].any()
    with torch.no_grad():
        new.x_decoder.hidden.layers[0].linear.weight[:, -2] = 1e-9
    rows = {row["name"]: row for row in state_diff(new, old, freeze)}
    assert rows[name]["changed"] == 8 and rows[name]["new"] == 8


def test_flags_are_truth_values(reference):
    adata = cells_of(["three", "two"], seed=1)
    with pytest.raises(InputError, match="freeze_classifier='no', expected True or False"):
        SCANVI.load_query_data(adata, reference, freeze_classifier="no")
    assert "pyro_scanvi" not in adata.uns


def test_a_strange_model_is_no_reference(reference):
    other = reference_of(("one", "zero"), encode_covariates=True, n_layers=2, **LATENT_LIBRARY)
    with pytest.raises(InputError, match="did not grow out of"):
        queried(reference).state_diff(other)
    with pytest.raises(InputError, match="SimpleNamespace, expected a SCANVI"):
        queried(reference).state_diff(SimpleNamespace())

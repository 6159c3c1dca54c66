"""Cells that count more often: weights, balanced draws, label subsampling; and the warm start."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pyro.infer import TraceEnum_ELBO

from pyro_scanvi import SCANVI, InputError, SemiSupervisedELBO
from pyro_scanvi.data.minibatches import (
    UNLABELED,
    MinibatchSampler,
    balanced_draw,
    subsampled_labels,
)
from pyro_scanvi.model.unsupervised import Unsupervised
from tests.examples import random_cells, simulated, small_model, small_vae

RARE = np.repeat([UNLABELED, 0, 1, 2], [40, 30, 7, 3])
QUIET = {"batch_size": 32, "progress_bar": False}


def gradients(vae, loss):
    return torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)


# ---- weights ------------------------------------------------------------------------------------


@pytest.fixture
def no_noise(monkeypatch):
    """Normals give their means, so that cells and their copies can be compared."""

    def zeros(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", zeros)


def cells_and_copies(vae, labels):
    """Six cells with weights, and the ten cells that they stand for."""
    cells = random_cells(vae, labels, n=6)
    times = torch.tensor([1, 2, 1, 3, 2, 1])
    copies = torch.arange(6).repeat_interleave(times)
    tensors = {k: v[copies] for k, v in vars(cells).items() if isinstance(v, torch.Tensor)}
    many = replace(cells, **(tensors | {"index": torch.arange(10), "n_obs": 10}))
    return replace(cells, weight=times.to(vae.y_prior.dtype) * 6 / 10), many


@pytest.mark.parametrize("feed_labels", [True, False])
@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
def test_a_weight_of_two_is_two_cells(labels, feed_labels, no_noise):
    """Loss and every gradient; weights are 1 on average, so the plate has as many cells."""
    vae = small_vae(use_observed_lib_size=False, library_log_means=[3], library_log_vars=[0.3])
    vae = vae.double().eval()
    elbo = SemiSupervisedELBO(vae.q_y, feed_labels=feed_labels, kl_weight=0.7)
    losses = [elbo.parts(vae.model, vae.guide, c).loss for c in cells_and_copies(vae, labels)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for one, other in zip(*(gradients(vae, loss) for loss in losses), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_weights_reach_pyros_own_elbo(no_noise):
    """They belong to model and guide, not to our objective."""
    torch.set_default_dtype(torch.float64)
    try:
        vae = small_vae().eval()
        found = [
            TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, c) / n
            for c, n in zip(cells_and_copies(vae, "mixed"), (6, 10), strict=True)
        ]
        torch.testing.assert_close(*found, rtol=1e-10, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_parts_are_not_weighted(no_noise):
    """They are of each cell."""
    vae = small_vae().eval()
    cells, _ = cells_and_copies(vae, "mixed")
    elbo = SemiSupervisedELBO(vae.q_y)
    parts = [elbo.parts(vae.model, vae.guide, c) for c in (cells, replace(cells, weight=None))]
    torch.testing.assert_close(parts[0].elbo(), parts[1].elbo())
    torch.testing.assert_close(parts[0].classification, parts[1].classification)


def test_weights_of_the_estimator():
    """A column or numbers, of any scale; and they matter."""
    weights = np.linspace(1, 3, 120)
    adata = simulated()
    adata.obs["weight"] = weights
    plain, column, numbers = (
        small_model(adata).train(2, **QUIET, cell_weights=w) for w in (None, "weight", 10 * weights)
    )
    assert column.history["elbo"].tolist() == pytest.approx(numbers.history["elbo"].tolist())
    assert not np.allclose(plain.history["elbo"], column.history["elbo"], rtol=1e-6)


@pytest.mark.parametrize(
    "weights, message",
    [
        (np.ones(119), r"shape \(119,\).*120 cells"),
        (np.r_[np.ones(119), 0], "0.0 for cell 'cell119'"),
        (np.r_[np.nan, np.ones(119)], "nan for cell 'cell0'"),
        ("wieght", "no column 'wieght'"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(InputError, match=message):
        small_model(simulated()).train(1, **QUIET, cell_weights=weights)


# ---- balanced draws -----------------------------------------------------------------------------


def test_a_balanced_draw_is_balanced():
    """13 or 14 of each label out of 40 labelled cells; each cell of a label as often, but one."""
    for seed in range(10):
        drawn = balanced_draw(RARE, np.random.default_rng(seed))
        assert len(drawn) == 40
        assert sorted(np.bincount(RARE[drawn])) == [13, 13, 14]
        times = np.bincount(drawn, minlength=len(RARE))
        for label in range(3):
            assert np.ptp(times[label == RARE]) <= 1


def test_balanced_draws_reach_every_cell():
    """30 cells share 13 or 14 draws an epoch: after 60 epochs (7e-13 a cell) all were seen."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([balanced_draw(RARE, rng) for _ in range(60)])
    assert set(drawn) == set(np.flatnonzero(RARE != UNLABELED))


def test_balanced_minibatches_keep_the_unlabelled():
    sampler = MinibatchSampler(RARE, 16, seed=1, balanced=True)
    epoch = list(sampler)
    assert [len(positions) for positions in epoch] == [16] * 5
    drawn = np.concatenate(epoch)
    assert sorted(drawn[RARE[drawn] == UNLABELED]) == list(range(40))
    assert all(7 <= (RARE[positions] != UNLABELED).sum() <= 9 for positions in epoch)


def test_balance_without_labels():
    label = np.full(10, UNLABELED)
    assert sorted(np.concatenate(list(MinibatchSampler(label, 4, 0, balanced=True)))) == list(
        range(10)
    )


def test_balanced_training_sees_rare_types_as_often():
    seen = []
    callback = LambdaCallback(on_train_batch_end=lambda *a: seen.extend(a[3].label.tolist()))
    adata = simulated()
    rare = (adata.obs["cell_type"] == "T").to_numpy().nonzero()[0]
    adata.obs.iloc[rare[4:], adata.obs.columns.get_loc("cell_type")] = "Unknown"
    small_model(adata).train(1, **QUIET, callbacks=[callback], train_size=1, class_balanced=True)
    counts = np.bincount(np.array(seen) + 1)[1:]
    assert np.ptp(counts) <= 1 and counts.min() > 10


# ---- label subsampling --------------------------------------------------------------------------


def test_subsampled_labels():
    rng = np.random.default_rng(0)
    masks = [subsampled_labels(RARE, 5, rng) for _ in range(50)]
    for mask in masks:
        assert mask[RARE == UNLABELED].all()
        assert np.bincount(RARE[mask & (RARE != UNLABELED)]).tolist() == [5, 5, 3]
    chosen = np.any(masks, axis=0) & (RARE != UNLABELED)
    assert chosen.sum() == 40  # a cell is left out of all by chance 1e-4


def test_only_subsampled_cells_are_classified():
    """The cross-entropy is theirs; the ELBO keeps the labels of all."""
    vae = small_vae().eval()
    cells = random_cells(vae, "all")
    some = replace(cells, classified=torch.arange(12) < 4)
    elbo, rest = SemiSupervisedELBO(vae.q_y, 50), SemiSupervisedELBO(vae.q_y, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = elbo.parts(vae.model, vae.guide, some)
        torch.manual_seed(0)
        bound = rest.parts(vae.model, vae.guide, cells).loss
    expected = torch.nn.functional.cross_entropy(parts.logits[:4], cells.label[:4])
    torch.testing.assert_close(parts.loss - bound, 50 * expected, rtol=1e-4, atol=1e-4)


def test_training_subsamples_anew_in_each_epoch():
    seen = {}

    def note(trainer, module, outputs, cells, i):
        known = module.last_cells.classified & cells.labelled
        seen.setdefault(trainer.current_epoch, set()).update(cells.index[known].tolist())

    callback = LambdaCallback(on_train_batch_end=note)
    small_model(simulated()).train(3, 4, **QUIET, callbacks=[callback])
    assert [len(cells) for cells in seen.values()] == [12, 12, 12]
    assert seen[0] != seen[1] != seen[2]


def test_the_second_argument_is_that_of_scvi_tools():
    with pytest.raises(ValueError, match="n_samples_per_label=0"):
        small_model(simulated()).train(3, 0)


# ---- the warm start -----------------------------------------------------------------------------


def test_the_warm_start_is_scvi(no_noise):
    """At the mean of q(z | x): -log p(x | z) and the KL from N(0, I), by hand."""
    vae = small_vae().double().eval()
    cells = random_cells(vae, "mixed")
    story = Unsupervised(vae)
    parts = story.objective().parts(story.model, story.guide, cells)
    loc, scale = vae.z_encoder((1 + cells.x).log())
    kl = (scale.log().neg() + (scale**2 + loc**2 - 1) / 2).sum(-1)
    torch.testing.assert_close(parts.kl["z"], kl)
    p_x = vae.p_x(loc, cells.x.sum(-1, keepdim=True), None, cells)
    torch.testing.assert_close(parts.reconstruction, -p_x.log_prob(cells.x))
    torch.testing.assert_close(parts.loss, (parts.reconstruction + kl).mean())


@pytest.mark.parametrize("dispersion", ["gene", "gene-label"])
def test_the_warm_start_leaves_what_it_does_not_know(dispersion):
    """Classifier and networks of u; encoder and decoder move."""
    model = small_model(simulated(), dispersion=dispersion, use_observed_lib_size=False)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    model.train(0, **QUIET, pretrain_epochs=2)
    moved = {k for k, v in model.module.state_dict().items() if not v.equal(before[k])}
    assert {k.split(".")[0] for k in moved} == {"z_encoder", "l_encoder", "x_decoder", "dispersion"}


def test_the_warm_start_in_the_history():
    model = small_model(simulated()).train(2, **QUIET, pretrain_epochs=3)
    kinds = model.history.groupby("epoch")["split"].agg(set).tolist()
    assert kinds == [{"pretrain", "pretrain_validation"}] * 3 + [{"train", "validation"}] * 2
    pretrained = model.history.query("split == 'pretrain'")
    assert pretrained["elbo"].is_monotonic_increasing
    assert pretrained[["accuracy", "cross_entropy", "kl_u", "kl_y"]].isna().all(axis=None)
    assert model.n_epochs_trained == 5
    pd.testing.assert_frame_equal(
        model.history, small_model(simulated()).train(2, **QUIET, pretrain_epochs=3).history
    )


def test_the_warm_start_is_saved(tmp_path):
    model = small_model(simulated()).train(1, **QUIET, pretrain_epochs=1)
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", simulated())
    pd.testing.assert_frame_equal(again.history, model.history)
    assert again.annotate().uns["pyro_scanvi"]["n_epochs"] == 2


def test_early_stopping_leaves_the_warm_start_alone():
    model = small_model(simulated())
    plan = {"lr": 0.0}
    stopping = {"early_stopping": True, "early_stopping_patience": 1}
    model.train(20, **QUIET, pretrain_epochs=6, plan_kwargs=plan, **stopping)
    assert (model.history["split"] == "pretrain").sum() == 6
    assert (model.history["split"] == "train").sum() < 20

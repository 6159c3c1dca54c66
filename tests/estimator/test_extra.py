"""Named data of cells, from the AnnData to every answer: proteins beside the counts."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from pyro.distributions import Poisson
from scipy.sparse import csr_matrix
from scipy.stats import poisson
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.training.nonfinite import NonFiniteError
from tests.examples import SMALL, as_they_are, simulated, small_vae

N, PROTEINS = 48, ("CD3", "CD19", "CD56")
EXTRA = {"protein": "obsm/protein_counts", "spliced": "layers/spliced", "age": "obs/age"}
RUN = {"batch_size": 16, "progress_bar": False}


class Protein(SCANVAE):
    """Poisson counts of proteins, of the cells in which they were measured."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_rate = nn.Linear(self.n_latent, self.n_extra["protein"])

    def observed(self, z, library, y, cells):
        protein = cells.extra["protein"]
        measured = ~protein.isnan().all(-1)
        p = Poisson(self.log_rate(z).exp()).to_event(1).mask(measured)
        return super().observed(z, library, y, cells) | {"protein": (p, protein.nan_to_num())}


def cells_with_proteins(n: int = N, lacking: int = 0, seed: int = 0) -> ad.AnnData:
    """Cells whose proteins, of the first `lacking` ones, were not measured."""
    adata = simulated(n, seed=seed)
    rng = np.random.default_rng(seed)
    protein = rng.poisson(5, size=(n, 3)).astype(float)
    protein[:lacking] = np.nan
    adata.obsm["protein_counts"] = pd.DataFrame(protein, adata.obs_names, list(PROTEINS))
    adata.layers["spliced"] = csr_matrix(rng.poisson(1, size=adata.shape))
    adata.obs["age"] = rng.integers(20, 80, size=n)
    return adata


def model_of(adata: ad.AnnData, extra=EXTRA, **arguments) -> SCANVI:
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra=extra)
    return SCANVI(adata, **(SMALL | {"module_class": Protein} | arguments))


@pytest.fixture(scope="module")
def trained() -> SCANVI:
    """Of which a quarter of the cells lacks the proteins."""
    return model_of(cells_with_proteins(lacking=N // 4)).train(2, pretrain_epochs=1, **RUN)


class Recorder(Callback):
    """The minibatches of training."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, cells, index):
        self.seen.append(cells)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_minibatches_of_training_hold_the_cells_of_the_adata(precision):
    adata, recorder = cells_with_proteins(lacking=5), Recorder()
    model = model_of(adata).train(1, precision=precision, callbacks=[recorder], **RUN)
    assert sorted(np.concatenate([c.position for c in recorder.seen])) == list(model.train_indices)
    assert any((c.position != c.index).any() for c in recorder.seen)
    for cells in recorder.seen:
        of_adata = adata[cells.position.numpy()]
        for name, expected in {
            "protein": of_adata.obsm["protein_counts"],
            "spliced": of_adata.layers["spliced"].toarray(),
            "age": of_adata.obs[["age"]],
        }.items():
            np.testing.assert_array_equal(cells.extra[name], expected, err_msg=name)
        np.testing.assert_array_equal(cells.x, of_adata.X)
        dtype = torch.float64 if precision == "64-true" else torch.float32
        assert {v.dtype for v in cells.extra.values()} == {cells.x.dtype} == {dtype}


def test_questions_know_the_position_in_the_adata():
    """Also where they are asked of some cells; a factor can look it up."""
    seen = []

    class Recording(Protein):
        def q_z(self, cells):
            seen.append(cells)
            return super().q_z(cells)

    adata = cells_with_proteins()
    model = as_they_are(model_of(adata, module_class=Recording))
    model.get_elbo(indices=[40, 3, 17], seed=0)
    model.get_elbo(cells_with_proteins(20, seed=1), indices=np.arange(20) > 16, seed=0)
    assert [c.position.tolist() for c in seen] == [[40, 3, 17], [17, 18, 19]]
    np.testing.assert_array_equal(seen[0].x, adata.X[[40, 3, 17]])


def test_history_and_elbo_are_sums_by_hand(trained):
    """Of one minibatch: the log probability of the proteins by scipy, 0 where there are none."""
    last = trained.history.iloc[-1]
    both = last["reconstruction_x"] + last["reconstruction_protein"]
    assert last["reconstruction"] == pytest.approx(both, rel=1e-6)
    vae, cells = trained.module, trained._data[np.arange(N)]
    z = torch.zeros(N, vae.n_latent) + 0.1
    with torch.no_grad():
        p, value = vae.observed(z, cells.x.sum(-1, True), None, cells)["protein"]
        rate = vae.log_rate(z).exp().numpy()
    expected = poisson.logpmf(trained.adata.obsm["protein_counts"], rate).sum(1)
    np.testing.assert_allclose(p.log_prob(value), np.nan_to_num(expected), rtol=1e-5)
    assert (p.log_prob(value)[: N // 4] == 0).all() and (expected[N // 4 :] < 0).all()


def test_a_cell_without_proteins_is_one_of_counts_alone(trained):
    """Each part of the ELBO and the marginal likelihood, against a model that observes no more."""
    adata = trained.adata.copy()
    plain = as_they_are(model_of(adata, module_class=SCANVAE))
    weights = trained.module.state_dict()
    own = {name: weights[name] for name in plain.module.state_dict()}
    plain.module.load_state_dict(own)
    lacking, measured = np.arange(N // 4), np.arange(N // 4, N)
    for ask in (
        lambda m, i: m.get_elbo(indices=i, return_mean=False, seed=1),
        lambda m, i: -m.get_reconstruction_error(indices=i, return_mean=False, seed=1),
        lambda m, i: m.get_marginal_ll(
            indices=i, n_mc_samples=5, return_mean=False, batch_size=64, seed=1
        ),
    ):
        np.testing.assert_allclose(ask(trained, lacking), ask(plain, lacking), rtol=1e-6)
        assert (ask(trained, measured) < ask(plain, measured) - 1).all()
    bayes = [
        m.predict(indices=lacking, soft=True, method="bayes", n_mc_samples=5, seed=1)
        for m in (trained, plain)
    ]
    np.testing.assert_allclose(*bayes, atol=1e-5)


def test_proteins_that_were_not_measured_are_drawn(trained):
    drawn = trained.posterior_predictive_sample(site="protein", n_samples=200, seed=0)
    assert drawn.shape == (N, 3, 200) and np.isfinite(drawn).all()
    vae, cells = trained.module, trained._data[np.arange(N // 4)]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        rates = vae.log_rate(vae.q_z(cells).sample((2000,))).exp().mean((0, 1))
    # 2,400 draws a protein: the standard error of their mean is 2 % at most; 6 of them are 1e-8.
    np.testing.assert_allclose(drawn[: N // 4].mean((0, 2)), rates, rtol=0.12)


def test_the_prior_draws_them():
    vae = small_vae_of_proteins()
    drawn = vae.prior(7, library=100.0)
    assert drawn["protein"].shape == (7, 3) and drawn["protein"].sum() > 0


def small_vae_of_proteins() -> Protein:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Protein(n_input=20, n_labels=3, n_hidden=8, n_latent=4, n_extra={"protein": 3})


@pytest.mark.parametrize("with_cells", [True, False])
def test_saved_and_loaded(trained, tmp_path, with_cells):
    trained.save(tmp_path / "model", save_anndata=True)
    adata = None if with_cells else cells_with_proteins(lacking=N // 4)
    again = SCANVI.load(tmp_path / "model", adata, module_class=Protein)
    assert again.fields.extra == trained.fields.extra
    assert again._data.equals(trained._data)
    elbos = [m.get_elbo(return_mean=False, seed=0) for m in (trained, again)]
    np.testing.assert_array_equal(*elbos)


def test_what_the_model_was_made_with_is_saved_where_it_has_changed(tmp_path):
    model = as_they_are(model_of(cells_with_proteins(lacking=4)))
    for held in (model.adata.obsm["protein_counts"], model.adata.layers["spliced"]):
        held *= 0
    model.adata.obs["age"] = 1
    with pytest.warns(UserWarning, match="or other data that the model reads, have changed"):
        model.save(tmp_path / "model", save_anndata=True)
    assert (model.adata.obs["age"] == 1).all(), "the AnnData itself stays as it is"
    assert SCANVI.load(tmp_path / "model", module_class=Protein)._data.equals(model._data)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_setup_survives_a_file(tmp_path, form):
    adata = cells_with_proteins(lacking=4)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra=EXTRA)
    path = tmp_path / f"cells.{form}"
    getattr(adata, f"write_{form}")(path)
    again = getattr(ad, f"read_{form}")(path)
    models = [SCANVI(cells, **SMALL, module_class=Protein) for cells in (adata, again)]
    assert models[0].fields.extra == models[1].fields.extra
    assert models[0]._data.equals(models[1]._data)


def test_a_query_brings_its_own(trained, tmp_path):
    """Its columns found by name; one that lacks the modality is refused, and told what to do."""
    new = cells_with_proteins(20, seed=3)
    new.obsm["protein_counts"]["new"] = 7.0
    new.obsm["protein_counts"] = new.obsm["protein_counts"][["new", *reversed(PROTEINS)]]
    new = SCANVI.prepare_query_anndata(new[:, 1:].copy(), trained)
    query = SCANVI.load_query_data(new, trained)
    np.testing.assert_array_equal(
        query._data.extra["protein"], new.obsm["protein_counts"][list(PROTEINS)]
    )
    assert query.module.n_extra == {"protein": 3, "spliced": 20, "age": 1}
    assert (query._data.extra["spliced"].toarray()[:, 0] == 0).all()
    assert np.isfinite(query.train(1, **RUN).get_elbo(seed=0))
    del new.obsm["protein_counts"]
    del new.uns["pyro_scanvi"]
    with pytest.raises(InputError, match="obsm has no 'protein_counts'.*not measured, say so") as e:
        SCANVI.load_query_data(new, trained)
    assert not new.uns
    exec(str(e.value).split("say so: ")[1], {"pd": pd, "np": np, "adata": new, "model": trained})
    assert SCANVI.load_query_data(new, trained)._data.extra["protein"].shape == (20, 3)


ASKED_WITHOUT = {
    "predict": lambda m, a: m.predict(a),
    "latent": lambda m, a: m.get_latent_representation(a),
    "expression": lambda m, a: m.get_normalized_expression(a, seed=0),
}
ASKED_WITH = {
    "elbo": lambda m, a: m.get_elbo(a),
    "marginal": lambda m, a: m.get_marginal_ll(a, n_mc_samples=2),
    "bayes": lambda m, a: m.predict(a, method="bayes"),
    "predictive": lambda m, a: m.posterior_predictive_sample(a, site="protein"),
}


def test_only_what_is_observed_needs_them(trained):
    new = cells_with_proteins(9, seed=1)
    expected = {name: ask(trained, new) for name, ask in ASKED_WITHOUT.items()}
    del new.obsm["protein_counts"]
    for name, ask in ASKED_WITHOUT.items():
        np.testing.assert_array_equal(ask(trained, new), expected[name])
    for ask in ASKED_WITH.values():
        with pytest.raises(InputError, match="obsm has no 'protein_counts', which the model reads"):
            ask(trained, new)


def test_a_factor_that_reads_what_is_not_there_says_what_is_missing(trained):
    class EncodesProtein(Protein):
        def encoder_input(self, cells):
            x, one_hots = super().encoder_input(cells)
            return x + cells.extra["protein"].nan_to_num().sum(-1, keepdim=True), one_hots

    model = as_they_are(model_of(cells_with_proteins(), module_class=EncodesProtein))
    new = cells_with_proteins(9)
    assert len(model.predict(new)) == 9
    del new.obsm["protein_counts"]
    with pytest.raises(InputError, match="obsm has no 'protein_counts'"):
        model.predict(new)
    with pytest.raises(InputError, match="these cells have no extra data 'protien', only: prot"):
        model._data[np.arange(3)].extra["protien"]


def test_a_resumed_run_asks_for_the_same_proteins(tmp_path):
    def untrained(change=0):
        adata = cells_with_proteins()
        adata.obsm["protein_counts"].iloc[7, 1] += change
        return model_of(adata)

    whole = untrained().train(2, **RUN)
    untrained().train(1, checkpoint_dir=tmp_path, **RUN)
    path = tmp_path / "last.ckpt"
    with pytest.raises(InputError, match=r"data was '2:\w+', is '2:\w+'"):
        untrained(change=1).train(2, ckpt_path=path, **RUN)
    resumed = untrained().train(2, ckpt_path=path, **RUN)
    for name, tensor in whole.module.state_dict().items():
        assert tensor.equal(resumed.module.state_dict()[name])


def test_a_value_that_breaks_the_loss_is_told_by_its_column():
    """A negative one has no Poisson probability; it is not among the cells that are masked."""
    adata = cells_with_proteins(lacking=4)
    adata.obsm["protein_counts"].iloc[11, 2] = -1.0
    model = model_of(adata)
    named = r"site 'protein', log probability, 1 cells \(cell11\), 1 columns \(CD56\)"
    with pytest.raises(NonFiniteError, match=named):
        model.train(1, train_size=1.0, **RUN)


def test_they_are_told(trained):
    assert "extra: protein in obsm['protein_counts'] (3 columns), spliced in" in repr(trained)
    row = trained.view_anndata_setup().loc["extra protein"]
    assert row.tolist() == ["obsm['protein_counts']", 3, "CD3, CD19, CD56"]


def test_a_module_of_its_own_class_that_wants_none_is_not_given_any():
    model = model_of(cells_with_proteins(), None, module_class=SCANVAE)
    assert model.module.n_extra == {} == small_vae().n_extra
    assert "n_extra" not in model.fields.sizes()

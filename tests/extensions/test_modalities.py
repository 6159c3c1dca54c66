"""Proteins beside the counts: by hand, where they were not measured, and what they are good for."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from pyro.distributions import MultivariateNormal
from scipy.stats import nbinom

from pyro_scanvi import SCANVAE, SCANVI, InputError, SemiSupervisedELBO, testing
from pyro_scanvi.extensions import Proteins
from tests.examples import SIZES, as_they_are, random_cells

EXTRA = {"protein": "obsm/protein"}
TYPES = np.array(["A", "B1", "B2"])


def set_up(adata):
    covariates = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    SCANVI.setup_anndata(
        adata, "label", "Unknown", batch_key="batch", extra={"adt": "obsm/adt"}, **covariates
    )
    return adata


@pytest.fixture(scope="module")
def adata():
    """Random cells and proteins, of which the first ten cells lack them."""
    found, rng = testing.random_cells(), np.random.default_rng(0)
    found.obsm["adt"] = rng.poisson(20 * np.exp(rng.normal(size=(60, 4)))).astype(float)
    found.obsm["adt"][:10] = np.nan
    return set_up(found)


def test_proteins_pass_the_checks(adata):
    for check in testing.CHECKS:
        check(testing.Subject(adata, Proteins, {"extra_name": "adt", "encode": True}))
    for check in testing.CHECKS_OF_TRACES:
        check(testing.Subject(adata, Proteins, {"extra_name": "adt", "background": [1, 5, 9, 2]}))


def made(**arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = SIZES | {"n_batch": 2, "n_extra": {"protein": 3}}
        return Proteins(**(sizes | arguments)).double().eval()


def cells_with_proteins(vae, lacking=4):
    cells = random_cells(vae)
    protein = torch.poisson(torch.full((len(cells), 3), 20.0)).double()
    protein[:lacking] = torch.nan
    cells.extra = {"protein": protein}
    return cells


def test_proteins_are_a_mixture_by_hand():
    """Of two negative binomials of scipy; 0 where they were not measured; sums to 1."""
    torch.manual_seed(0)
    vae = made(background=[1.0, 5.0, 30.0])
    vae.log_background.data += torch.randn(2, 3)
    vae.protein_log_theta.data += torch.tensor([0.0, 1.0, 2.0])
    cells = cells_with_proteins(vae)
    z = torch.randn(12, 4).double()
    p, value = vae.observed(z, cells.x.sum(-1, True), None, cells)["protein"]
    with torch.no_grad():
        logits, fold = vae.protein_decoder(z).chunk(2, -1)
        background = vae.log_background.exp()[cells.batch].numpy()
        theta, share = vae.protein_log_theta.exp().numpy(), logits.sigmoid().numpy()
        foreground = background * (1 + fold.exp().numpy())
        found = p.log_prob(value).numpy()
        mean = p.mean.numpy()

    def mixture(x):
        parts = (nbinom.pmf(x, theta, theta / (theta + m)) for m in (background, foreground))
        return next(parts) * share + next(parts) * (1 - share)

    expected = np.log(mixture(value.numpy())).sum(1)
    np.testing.assert_allclose(found[4:], expected[4:], rtol=1e-8)
    assert (found[:4] == 0).all()
    np.testing.assert_allclose(mean, share * background + (1 - share) * foreground, rtol=1e-8)
    counts = torch.arange(5000.0).double().reshape(-1, 1, 1)
    each = testing.elementwise(p).log_prob(counts).exp().sum(0)
    torch.testing.assert_close(each, torch.ones_like(each), atol=1e-4, rtol=0)


def test_the_encoders_are_multiplied():
    """The density is that of the product, up to a constant; without proteins the first alone."""
    torch.manual_seed(0)
    vae = made(encode=True)
    cells = cells_with_proteins(vae)
    q, alone = vae.q_z(cells).base_dist, SCANVAE.q_z(vae, cells).base_dist
    torch.testing.assert_close(q.mean[:4], alone.mean[:4])
    torch.testing.assert_close(q.scale[:4], alone.scale[:4])
    measured = cells.extra["protein"][4:]
    other = torch.distributions.Normal(*vae.protein_encoder(measured.log1p()))
    points = torch.linspace(-3, 3, 7).double().reshape(-1, 1, 1)
    ratio = (q.log_prob(points) - alone.log_prob(points))[:, 4:] - other.log_prob(points)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_new_batch_starts_with_the_mean_background(adata):
    model = as_they_are(SCANVI(adata, module_class=Proteins, extra_name="adt", n_latent=3))
    model.module.log_background.data = torch.tensor([[1.0, 2, 3, 4], [3.0, 4, 5, 6]])
    new = adata.copy()
    new.obs["batch"] = "three"
    new.obsm["adt"] = np.full((60, 4), np.nan)
    query = SCANVI.load_query_data(new, model)
    assert query.module.log_background[2].tolist() == [2, 3, 4, 5]
    drawn = query.posterior_predictive_sample(site="adt", seed=0)
    assert drawn.shape == (60, 4) and np.isfinite(drawn).all()


def test_who_needs_the_proteins(adata):
    """Labels of new cells do not, unless the encoder reads them."""
    new = adata.copy()
    del new.obsm["adt"]
    arguments = {"module_class": Proteins, "extra_name": "adt", "n_latent": 3}
    assert len(as_they_are(SCANVI(adata, **arguments)).predict(new)) == 60
    with pytest.raises(InputError, match="adt"):
        as_they_are(SCANVI(adata, encode=True, **arguments)).predict(new)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="'rna' is not a name of setup_anndata"):
        made(extra_name="rna")
    for background in (0.0, [1.0, 2.0], [1.0, 2.0, float("inf")]):
        with pytest.raises(InputError, match="a positive number of counts, or one for each"):
            made(background=background)


class Dependent(SCANVAE):
    """A posterior whose dimensions depend on one another."""

    def q_z(self, cells):
        q = super().q_z(cells).base_dist
        return MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale))


class Mixed(Proteins, Dependent):
    pass


def test_a_posterior_of_dependent_dimensions_is_not_multiplied():
    vae = Mixed(**SIZES, n_extra={"protein": 3}, encode=True).double()
    with pytest.raises(InputError, match="q_z gives a MultivariateNormal"):
        vae.q_z(cells_with_proteins(vae))


def simulated(seed=0, n=150):
    """B1 and B2 have the same genes and other proteins, which a fifth of the cells lacks."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n)
    genes = np.exp(rng.normal(size=(2, 15)) + 2)
    x = rng.poisson(genes[np.minimum(kind, 1)]).astype(np.float32) + 1
    on = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])[kind]
    protein = rng.poisson(rng.gamma(2, 5 * (1 + 7 * on))).astype(float)
    protein[rng.random(n) < 0.2] = np.nan
    truth = TYPES[kind]
    shown = np.where(rng.random(n) < 0.4, truth, "Unknown")
    adata = ad.AnnData(x, pd.DataFrame({"given": shown, "truth": truth}).rename(index=str))
    adata.obsm["protein"] = protein
    SCANVI.setup_anndata(adata, "given", "Unknown", extra=EXTRA)
    return adata


def test_proteins_tell_types_that_genes_do_not():
    """By chance alone half of the 49 hidden cells is right, and .85 in one of ten million."""
    adata = simulated(seed=1)
    hidden = (adata.obs["given"] == "Unknown") & (adata.obs["truth"] != "A")
    measured = ~np.isnan(adata.obsm["protein"]).all(1)
    small = {"n_latent": 5, "n_hidden": 16, "dropout_rate": 0.1}
    model = as_they_are(SCANVI(adata, module_class=Proteins, encode=True, **small))
    vae, cells = model.module.train(), model._data[np.arange(len(adata))]
    loss = SemiSupervisedELBO(vae.q_y, point=vae.latent_point)(vae.model, vae.guide)
    adam = torch.optim.Adam(vae.parameters(), lr=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(50):
            adam.zero_grad()
            loss(cells).backward()
            adam.step()
    right = (model.predict() == adata.obs["truth"]).to_numpy()
    assert right[hidden & measured].mean() > 0.85
    assert right[~measured].mean() > 0.5  # which are told from A by their genes alone

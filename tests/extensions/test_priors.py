"""Priors of u: densities by scipy, and what they start from."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.special import logsumexp
from scipy.stats import norm

from pyro_scanvi import InputError
from pyro_scanvi.extensions import MixturePrior, VampPrior
from tests.examples import SIZES, random_cells


def make(kind, seed=0, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**(SIZES | arguments)).eval()


def moved(vae, prefix):
    """The same model with other parameters of the prior."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, p in vae.named_parameters():
            if name.startswith(prefix):
                p += torch.randn(p.shape)
    return vae


def test_the_density_of_a_mixture_is_that_of_scipy():
    vae = moved(make(MixturePrior, n_components=3), "component")
    u = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    p = {name: t.detach().double().numpy() for name, t in vae.named_parameters()}
    scales = np.sqrt(np.exp(p["component_log_vars"]) + 1e-4)
    each = norm(p["component_means"], scales).logpdf(u.numpy()[:, None]).sum(-1)
    log_weights = p["component_logits"] - logsumexp(p["component_logits"])
    expected = logsumexp(each + log_weights, axis=1)
    found = vae.p_u(random_cells(vae)).log_prob(u).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("n_latent", [2, 10, 50])
def test_no_component_starts_without_a_share(n_latent):
    """Of states from N(0, I), whatever their dimension; and a mixture starts near it."""
    vae = make(MixturePrior, n_latent=n_latent)
    u = torch.randn(500, n_latent, generator=torch.Generator().manual_seed(0))
    mixture = vae.p_u(random_cells(vae))
    of_each = mixture.component_distribution.log_prob(u.unsqueeze(1))
    shares = of_each.softmax(-1).mean(0)
    assert shares.min() > 0.02 and shares.max() < 0.3  # of 10 components
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert (standard - mixture.log_prob(u)).mean() < 0.5  # nats


def test_a_vamp_prior_is_the_mean_of_the_posterior_of_u_at_pseudo_cells():
    """Each of them asked alone; batches and categories in turn, continuous covariates 0."""
    arguments = {"n_batch": 2, "n_cats_per_cov": [3], "n_continuous_cov": 1}
    vae = make(VampPrior, n_pseudo=4, encode_covariates=True, **arguments)
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    each = []
    with torch.no_grad():
        for i in range(4):
            cell = random_cells(vae, n=1)
            cell.x = vae.pseudo_log_counts[[i]].exp()
            cell.batch, cell.categorical = torch.tensor([i % 2]), torch.tensor([[i % 3]])
            cell.continuous = torch.zeros(1, 1)
            z, y = vae.q_z(cell).mean, vae.pseudo_labels[[i]].softmax(-1)
            q = vae.q_u(z, y, cell)
            each.append(norm(q.mean.numpy(), q.stddev.numpy()).logpdf(u.numpy()).sum(-1))
        found = vae.p_u(random_cells(vae)).log_prob(u).numpy()
    np.testing.assert_allclose(found, logsumexp(each, axis=0) - np.log(4), rtol=1e-4)


def test_pseudo_cells_move_no_statistics():
    vae = make(VampPrior, n_pseudo=5).train()
    before = {name: t.clone() for name, t in vae.named_buffers()}
    vae.p_u(random_cells(vae)).log_prob(torch.zeros(4)).backward()
    assert all(torch.equal(t, before[name]) for name, t in vae.named_buffers())
    assert vae.pseudo_log_counts.grad.abs().sum() > 0


def test_pseudo_cells_start_at_given_counts():
    counts = np.array([[0, 3] * 10, [7, 1] * 10])
    vae = make(VampPrior, pseudo_counts=counts)
    found = vae.pseudo_cells().x.detach()
    torch.testing.assert_close(found, torch.tensor(counts).float().clamp(min=0.05))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (csr_matrix(np.ones((2, 20))), "expected an array of numbers.*toarray"),
        (np.ones((2, 19)), r"shape \(2, 19\), expected a row .* each of the 20 genes"),
        (np.ones((0, 20)), r"shape \(0, 20\)"),
        (-np.ones((2, 20)), "negative"),
        (np.full((2, 20), np.nan), "not finite"),
    ],
)
def test_pseudo_counts_that_are_none_are_refused(counts, said):
    with pytest.raises(InputError, match=said):
        make(VampPrior, pseudo_counts=counts)


@pytest.mark.parametrize(
    ("kind", "argument"), [(MixturePrior, "n_components"), (VampPrior, "n_pseudo")]
)
def test_of_nothing_there_is_no_prior(kind, argument):
    with pytest.raises(InputError, match=f"{argument}=0, expected an integer of at least 1"):
        make(kind, **{argument: 0})

"""Pyro's own tools beside the model: NUTS, AutoGuides, pictures; and priors that ask an encoder."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.infer.mcmc.util import initialize_model
from scipy.special import logsumexp
from scipy.stats import norm
from torch import nn

from pyro_scanvi import SCANVAE, Cells, InputError, SemiSupervisedELBO
from pyro_scanvi.model.networks import frozen_statistics
from tests.examples import SIZES, random_cells, small_vae


@pytest.fixture(autouse=True)
def no_parameters_left():
    """AutoGuides put theirs into Pyro's store."""
    yield
    pyro.clear_param_store()


# ---- NUTS ----------------------------------------------------------------------------------------


class Line(SCANVAE):
    """K = 1: z ~ N(u + y1 - y0, 1/4), and counts of two genes are N(z, 1)."""

    def __init__(self):
        super().__init__(2, n_labels=2, n_latent=1, n_hidden=2, y_prior=[0.25, 0.75])
        self.double().eval()

    def p_z(self, u, y, cells):
        return dist.Normal(u + y[..., 1:] - y[..., :1], 0.5).to_event(1)

    def p_x(self, z, library, y, cells):
        return dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1)


def few_cells():
    return Cells.from_counts(torch.tensor([[0.5, 1.0], [0.0, 1.5], [3.0, 2.0]]).double())


def start_of(vae, cells):
    drawn = poutine.trace(vae.guide).get_trace(cells).nodes
    return init_to_value(values={name: drawn[name]["value"].detach() for name in ("u", "z")})


def test_the_potential_of_nuts_is_minus_log_p_with_y_summed_out():
    """At many values, to the rounding of float64: one value of z for each cell."""
    vae, cells = Line(), few_cells()
    start, potential, _, _ = initialize_model(
        vae.model, (cells,), init_strategy=start_of(vae, cells)
    )
    assert {name: value.shape for name, value in start.items()} == {"u": (3, 1), "z": (3, 1)}
    rng, found, expected = np.random.default_rng(0), [], []
    for _ in range(10):
        u, z = rng.normal(size=(2, 3, 1))
        found.append(potential({"u": torch.tensor(u), "z": torch.tensor(z)}).item())
        by_label = [
            np.log(p) + norm(u + shift, 0.5).logpdf(z) for p, shift in ((0.25, -1), (0.75, 1))
        ]
        log_p = logsumexp(by_label, 0) + norm(0, 1).logpdf(u)
        expected.append(log_p.sum() + norm(z, 1).logpdf(cells.x.numpy()).sum())
    np.testing.assert_allclose(np.diff(found), -np.diff(expected), rtol=0, atol=1e-6)


def test_draws_of_nuts_have_a_value_for_each_cell():
    vae, cells = Line(), few_cells()
    kernel = NUTS(vae.model, init_strategy=start_of(vae, cells), max_tree_depth=2)
    chain = MCMC(kernel, num_samples=3, warmup_steps=1, disable_progbar=True)
    chain.run(cells)
    assert {name: value.shape for name, value in chain.get_samples().items()} == {
        "u": (3, 3, 1),
        "z": (3, 3, 1),
    }


def test_nuts_without_a_start_is_refused():
    """It would sample a z for each label."""
    with pytest.raises(InputError, match="z would start with a value for each label.*init_to_val"):
        NUTS(Line().model).setup(1, few_cells())


# ---- AutoGuides ----------------------------------------------------------------------------------


class Dispersed(SCANVAE):
    """A positive site that all cells share; the guide leaves it to others."""

    def p_shared(self):
        return {"scale": dist.LogNormal(torch.zeros(()), 1.0)}


def beside(auto, vae):
    def guide(cells):
        auto(cells)
        vae.guide(cells)

    return guide


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_an_auto_normal_beside_our_guide(kl_weight):
    """Its cost is that of its Normal of the logarithm against N(0, 1), at the draw."""
    vae = Dispersed(**SIZES).eval()
    cells = random_cells(vae, n_obs=600)
    auto = AutoNormal(poutine.block(vae.model, expose=["scale"]), init_scale=0.5)
    elbo = SemiSupervisedELBO(None, kl_weight=kl_weight)
    auto(cells)
    dict(auto.named_parameters())["locs.scale_unconstrained"].data.fill_(0.7)
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            v = auto(cells)["scale"].log().item()
            torch.manual_seed(seed)
            parts = elbo.parts(vae.model, beside(auto, vae), cells)
        assert sorted(parts.kl_shared) == ["scale", "scale_unconstrained"]
        cost = norm(0.7, 0.5).logpdf(v) - norm(0, 1).logpdf(v)
        assert parts.kl_global.item() == pytest.approx(cost, abs=1e-4)
        weighed = {site: kl_weight if site in ("u", "y") else 1.0 for site in parts.kl}
        local = parts.reconstruction + sum(w * parts.kl[site] for site, w in weighed.items())
        expected = local.mean().item() + kl_weight * cost / 600
        assert parts.loss.item() == pytest.approx(expected, rel=1e-5)
    parts.loss.backward()
    assert dict(auto.named_parameters())["locs.scale_unconstrained"].grad is not None


def test_an_auto_delta_beside_our_guide():
    """A point: its cost is -log p."""
    vae = Dispersed(**SIZES).eval()
    cells = random_cells(vae)
    auto = AutoDelta(poutine.block(vae.model, expose=["scale"]))
    parts = SemiSupervisedELBO(None).parts(vae.model, beside(auto, vae), cells)
    expected = -vae.p_shared()["scale"].log_prob(auto.scale)
    torch.testing.assert_close(parts.kl_shared["scale"], expected.detach())


def test_an_auto_normal_of_cells_takes_our_subsample():
    """Parameters of ten cells, of which four are a minibatch."""
    vae = small_vae().eval()
    whole = random_cells(vae, n=10)
    auto = AutoNormal(
        poutine.block(vae.model, expose=["u", "z"]),
        create_plates=lambda cells: pyro.plate("cells", cells.n_obs, subsample=cells.index, dim=-1),
    )
    auto(whole)
    some = copy.copy(whole)
    some.x, some.batch, some.label = (t[[7, 2, 9, 4]] for t in (whole.x, whole.batch, whole.label))
    some.index = torch.tensor([7, 2, 9, 4])
    drawn = auto(some)
    assert drawn["z"].shape == (4, 4)
    drawn["z"].sum().backward()
    moved = dict(auto.named_parameters())["locs.z_unconstrained"].grad
    assert moved.abs().sum(-1).nonzero().flatten().tolist() == [2, 4, 7, 9]


# ---- a prior that asks an encoder ----------------------------------------------------------------


class VampPrior(SCANVAE):
    """p(z) is the mean of q(z | x) at learned cells."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_counts = nn.Parameter(torch.randn(5, self.n_input))

    def p_z(self, u, y, cells):
        with frozen_statistics(self):
            q = self.q_z(Cells.from_counts(self.log_counts.exp()))
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(5)), q)


def test_pseudo_inputs_move_no_statistics_and_learn():
    """Those of the encoder of z are what a plain model has, after three steps in train mode."""
    plain, own = small_vae(), VampPrior(**SIZES)
    own.load_state_dict(plain.state_dict(), strict=False)
    cells = random_cells(plain)
    for vae in (plain, own):
        for _ in range(3):
            SemiSupervisedELBO(vae.q_y).parts(vae.train().model, vae.guide, cells).loss.backward()
    for name, value in plain.z_encoder.state_dict().items():
        assert torch.equal(own.z_encoder.state_dict()[name], value), name
    assert own.log_counts.grad.abs().min() > 0
    assert all(module.training for module in own.modules())


# ---- a picture -----------------------------------------------------------------------------------


def test_a_picture_holds_sites_plate_and_relations():
    vae = small_vae(use_observed_lib_size=False, library_log_means=[1.0], library_log_vars=[1.0])
    source = pyro.render_model(vae.model, model_args=(random_cells(vae),)).source
    for site in ("u", "z", "l", "x"):
        assert f"\t{site} [" in source
    for relation in ("u -> z", "z -> x", "l -> x"):
        assert relation in source
    assert "label=cells" in source

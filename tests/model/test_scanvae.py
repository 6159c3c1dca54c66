"""SCANVAE as a Pyro program: its sites, shapes and factors; plain Pyro on it; its errors."""

import copy
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Dirichlet,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)
from pyro.distributions.transforms import ExpTransform
from pyro.infer import SVI, Predictive, TraceEnum_ELBO
from pyro.infer.inspect import get_model_relations
from torch import nn

from pyro_scanvi import SCANVAE, InputError
from tests.examples import SIZES, random_cells, small_vae

LATENT_LIBRARY = {
    "use_observed_lib_size": False,
    "library_log_means": [3.7],
    "library_log_vars": [0.1],
}


def plain_svi(vae, lr=1e-3):
    adam = pyro.optim.ClippedAdam({"lr": lr})
    return SVI(vae.model, vae.guide, adam, TraceEnum_ELBO(max_plate_nesting=1))


# ---- sites and shapes ---------------------------------------------------------------------------


def shapes(trace):
    """Batch and event shape of every sample site but the plate."""
    sites = {k: v for k, v in trace.nodes.items() if v["type"] == "sample" and k != "cells"}
    return {k: (tuple(v["fn"].batch_shape), tuple(v["fn"].event_shape)) for k, v in sites.items()}


def test_sites_of_the_model():
    vae = small_vae(**LATENT_LIBRARY)
    trace = poutine.trace(vae.model).get_trace(random_cells(vae))
    labels = {"y": ((12,), (3,)), "label": ((12,), (0,))}
    states = {"u": ((12,), (4,)), "z": ((12,), (4,)), "l": ((12,), (1,)), "x": ((12,), (20,))}
    assert shapes(trace) == labels | states
    assert set(trace.observation_nodes) == {"x", "label"}
    assert len(trace.param_nodes) == len(list(vae.parameters()))
    assert "l dist 12  |  1" in trace.format_shapes()


def test_sites_of_the_guide():
    """Enumerated, the label has its own dimension on the left of the cells."""
    vae = small_vae(**LATENT_LIBRARY)
    cells = random_cells(vae)
    trace = poutine.trace(poutine.enum(vae.guide, first_available_dim=-2)).get_trace(cells)
    cell, both = (12,), (3, 12)
    assert shapes(trace) == {
        "z": (cell, (4,)),
        "y": (cell, (3,)),
        "u": (both, (4,)),
        "l": (cell, (1,)),
    }
    assert trace.nodes["y"]["value"].shape == (3, 1, 3)


def test_labels_that_are_all_known_are_not_enumerated():
    """Each cell is decoded for its own label alone."""
    vae = small_vae()
    for labels, n_values in (("all", 1), ("mixed", 3)):
        cells = random_cells(vae, labels)
        trace = poutine.trace(poutine.enum(vae.guide, first_available_dim=-2)).get_trace(cells)
        assert trace.nodes["u"]["value"].shape == (n_values, 12, 4)
    one_hot = trace.nodes["y"]["fn"].probs[cells.labelled]
    assert torch.equal(one_hot, torch.eye(3)[cells.label[cells.labelled]])


def test_observed_library_is_no_site():
    vae = small_vae()
    cells = random_cells(vae)
    for program in (vae.model, vae.guide):
        assert "l" not in poutine.trace(program).get_trace(cells).nodes
    torch.testing.assert_close(vae.observed_library(cells), cells.x.sum(1, keepdim=True))


def test_factors_are_distributions_of_the_documented_shapes():
    vae = small_vae(**LATENT_LIBRARY)
    cells = random_cells(vae)
    z, u = torch.randn(3, 12, 4), torch.randn(3, 12, 4)
    y = torch.eye(3).unsqueeze(1).expand(3, 12, 3)
    library = torch.full((12, 1), 40.0)
    expected = {
        vae.p_u(cells): ((), (4,)),
        vae.p_y(cells): ((), (3,)),
        vae.p_z(u, y, cells): ((3, 12), (4,)),
        vae.p_l(cells): ((12,), (1,)),
        vae.p_x(z, library, y, cells): ((3, 12), (20,)),
        vae.q_z(cells): ((12,), (4,)),
        vae.q_y(z, cells): ((3, 12), (3,)),
        vae.q_u(z, y, cells): ((3, 12), (4,)),
        vae.q_l(cells): ((12,), (1,)),
    }
    for factor, (batch, event) in expected.items():
        assert isinstance(factor, pyro.distributions.Distribution)
        assert (tuple(factor.batch_shape), tuple(factor.event_shape)) == (batch, event), factor


def test_priors():
    """N(0, I), the label prior, and a LogNormal with the moments of the cell's batch."""
    library = {"library_log_means": [3.0, 4.0], "library_log_vars": [0.25, 0.09]}
    vae = small_vae(
        n_batch=2, y_prior=[0.5, 0.3, 0.2], use_observed_lib_size=False, **library
    ).double()
    cells = random_cells(vae)
    at = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    expected = -0.5 * (at**2).sum() - 2 * np.log(2 * np.pi)
    torch.testing.assert_close(vae.p_u(cells).log_prob(at), expected)
    torch.testing.assert_close(vae.p_y(cells).probs, torch.tensor([0.5, 0.3, 0.2]).double())
    means, variances = (torch.tensor(v).double()[cells.batch] for v in library.values())
    torch.testing.assert_close(vae.p_l(cells).mean[:, 0], (means + variances / 2).exp())


# ---- plain Pyro -------------------------------------------------------------------------------


def test_plain_svi_trains():
    vae = small_vae()
    cells = random_cells(vae, n=30)
    svi = plain_svi(vae, lr=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [svi.step(cells) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert len(pyro.get_param_store()) == 0


def test_two_models_do_not_meet():
    """Training one leaves the other as it was, bit for bit."""
    vaes = [small_vae(seed=0), small_vae(seed=0)]
    before = copy.deepcopy(vaes[1].state_dict())
    cells = random_cells(vaes[0])
    svis = [plain_svi(vae) for vae in vaes]
    svis[0].step(cells)
    for name, value in vaes[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    svis[1].step(cells)
    assert len(pyro.get_param_store()) == 0
    moved = [not torch.equal(p, before[name]) for name, p in vaes[1].named_parameters()]
    assert all(moved)


def test_frozen_parameters_stay():
    vae = small_vae()
    frozen = vae.z_encoder.requires_grad_(False)
    before = {n: p.clone() for n, p in frozen.named_parameters()}
    cells = random_cells(vae)
    shown = poutine.trace(vae.model).get_trace(cells).param_nodes
    assert shown and not any("z_encoder" in name for name in shown)
    plain_svi(vae).step(cells)
    assert all(torch.equal(p, before[n]) for n, p in frozen.named_parameters())


def test_module_form_under_a_torch_optimiser():
    vae = small_vae()
    cells = random_cells(vae, n=30)
    bound = TraceEnum_ELBO(max_plate_nesting=1)(vae.model, vae.guide)
    adam = torch.optim.Adam(vae.parameters(), lr=0.01)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(40):
            adam.zero_grad()
            loss = bound(cells)
            loss.backward()
            adam.step()
            losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert len(pyro.get_param_store()) == 0
    assert not list(bound.parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_prior(parallel):
    """Unconditioned, the model draws labels and counts; the counts have the cells' library.

    Means of 200 x 12 draws: a false alarm comes once in 1.7 million seeds (5 sigma).
    """
    vae = small_vae(y_prior=[0.7, 0.2, 0.1], gene_likelihood="poisson").eval()
    cells = random_cells(vae, "none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = Predictive(poutine.uncondition(vae.model), num_samples=200, parallel=parallel)
        drawn = prior(cells)
    assert drawn["x"].shape == (200, 12, 20)
    assert drawn["u"].shape == drawn["z"].shape == (200, 12, 4)
    share = drawn["y"].mean((0, 1))
    expected = torch.tensor([0.7, 0.2, 0.1])
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 2400).sqrt()).all()
    library = cells.x.sum(1)
    error = drawn["x"].sum(-1).mean(0) - library
    assert (error.abs() < 5 * (library / 200).sqrt()).all()


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
def test_one_cell_trains(labels):
    vae = small_vae(n_layers=2)
    losses = [plain_svi(vae).step(random_cells(vae, labels, n=1)) for _ in range(2)]
    assert np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in vae.state_dict().values())


# ---- the whole model is its state dict ----------------------------------------------------------


def trained(**arguments):
    vae = small_vae(**arguments)
    plain_svi(vae).step(random_cells(vae))
    return vae.eval()


def same(one, other):
    """Whether two models classify alike, bit for bit."""
    x = random_cells(one).x
    return torch.equal(one.classify(x), other.classify(x))


def test_state_dict_round_trips():
    vae, new = trained(**LATENT_LIBRARY), small_vae(seed=1, **LATENT_LIBRARY).eval()
    assert not same(vae, new)
    new.load_state_dict(vae.state_dict())
    assert same(vae, new)
    assert {"y_prior", "library_log_means", "library_log_vars"} <= set(vae.state_dict())


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_deepcopy_and_pickle_after_training(likelihood):
    vae = trained(gene_likelihood=likelihood, latent_distribution="ln")
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert same(vae, twin)
        plain_svi(twin.train()).step(random_cells(twin))
        assert not same(vae, twin.eval())  # no parameter is shared


# ---- where layers are ---------------------------------------------------------------------------

ENCODERS = {"z_encoder", "l_encoder", "u_encoder", "classifier"}
DECODERS = {"z_decoder", "x_decoder"}
PLACES = {
    "encoder": ENCODERS,
    "decoder": DECODERS,
    "both": ENCODERS | DECODERS,
    "none": set(),
}


def networks_with(vae, layer):
    return {name.split(".")[0] for name, module in vae.named_modules() if isinstance(module, layer)}


@pytest.mark.parametrize("place", PLACES)
def test_norms_are_where_they_should_be(place):
    batch = small_vae(use_batch_norm=place, **LATENT_LIBRARY)
    assert networks_with(batch, nn.BatchNorm1d) == PLACES[place]
    assert networks_with(batch, nn.LayerNorm) == set()
    layer = small_vae(use_layer_norm=place, use_batch_norm="none", **LATENT_LIBRARY)
    assert networks_with(layer, nn.LayerNorm) == PLACES[place]
    assert networks_with(layer, nn.BatchNorm1d) == set()


def test_dropout_is_in_encoders_and_classifier_only():
    vae = small_vae(**LATENT_LIBRARY, dropout_rate=0.3)
    assert networks_with(vae, nn.Dropout) == ENCODERS
    assert {m.p for m in vae.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert not networks_with(small_vae(dropout_rate=0.0), nn.Dropout)


# ---- errors -------------------------------------------------------------------------------------

ERRORS = [
    ({"n_hiden": 8}, TypeError, "'n_hiden'.*did you mean 'n_hidden'"),
    ({"likelihood": "nb"}, TypeError, "'likelihood'.*did you mean 'gene_likelihood'"),
    ({"n_input": 0}, ValueError, "n_input=0.*at least 1"),
    ({"n_hidden": 8.0}, ValueError, "n_hidden=8.0.*an integer"),
    ({"n_latent": 0}, ValueError, "n_latent=0"),
    ({"n_layers": -1}, ValueError, "n_layers=-1.*at least 0"),
    ({"n_batch": -1}, ValueError, "n_batch=-1"),
    ({"n_labels": 1}, ValueError, "n_labels=1.*at least 2"),
    ({"n_continuous_cov": -1}, ValueError, "n_continuous_cov=-1"),
    ({"n_cats_per_cov": [2, 0]}, ValueError, r"n_cats_per_cov\[1\]=0"),
    ({"dropout_rate": 1.0}, ValueError, "dropout_rate=1.0"),
    ({"dispersion": "genes"}, ValueError, "dispersion='genes'.*'gene-cell'"),
    ({"gene_likelihood": "zip"}, ValueError, "gene_likelihood='zip'.*'poisson'"),
    ({"latent_distribution": "log"}, ValueError, "latent_distribution='log'.*'ln'"),
    ({"use_batch_norm": True}, ValueError, "use_batch_norm=True"),
    ({"dispersion": None}, ValueError, "dispersion=None"),
    ({"use_layer_norm": "all"}, ValueError, "use_layer_norm='all'.*'both'"),
    ({"batch_representation": "dense"}, ValueError, "batch_representation='dense'.*'embedding'"),
    ({"batch_embedding_kwargs": {"embedding_dim": 3}}, ValueError, "needs batch_representation"),
    (
        {"batch_representation": "embedding", "batch_embedding_kwargs": {"embeding_dim": 3}},
        TypeError,
        "did you mean 'embedding_dim'",
    ),
    (
        {"batch_representation": "embedding", "batch_embedding_kwargs": {"embedding_dim": 0}},
        ValueError,
        "embedding_dim=0",
    ),
    ({"y_prior": [0.5, 0.5]}, ValueError, r"shape \(2,\).*3 labels"),
    ({"y_prior": [0.5, 0.4, 0.3]}, ValueError, "sums to 1.2"),
    ({"y_prior": [1.1, 0.2, -0.3]}, ValueError, "smallest entry is -0.3"),
    ({"labels_groups": [0, 0, 1]}, ValueError, "without use_labels_groups=True"),
    ({"use_labels_groups": True}, ValueError, "without labels_groups"),
    ({"labels_groups": [0, 1], "use_labels_groups": True}, ValueError, r"shape \(2,\)"),
    ({"labels_groups": [0, 2, 2], "use_labels_groups": True}, ValueError, "without gaps"),
    ({"classifier_parameters": {"n_hiden": 4}}, TypeError, "did you mean 'n_hidden'"),
    ({"classifier_parameters": {"logits": False}}, ValueError, "always returns logits"),
    ({"classifier_parameters": {"n_layers": -1}}, ValueError, "n_layers=-1"),
    ({"classifier_parameters": {"dropout_rate": 2}}, ValueError, "dropout_rate=2"),
    ({"use_observed_lib_size": False}, ValueError, "needs library_log_means"),
    ({"library_log_means": [3.0]}, ValueError, "belongs to a latent library"),
    (LATENT_LIBRARY | {"library_log_means": [3.0, 4.0]}, ValueError, "2 numbers, expected 1"),
    (LATENT_LIBRARY | {"library_log_vars": [0.0]}, ValueError, "finite and positive"),
    (LATENT_LIBRARY | {"use_size_factor_key": True}, ValueError, "choose one"),
    ({"extra_encoder_kwargs": {"activate": nn.ELU}}, TypeError, "did you mean 'activation'"),
    ({"extra_decoder_kwargs": {"biass": False}}, TypeError, "did you mean 'bias'"),
]


@pytest.mark.parametrize(
    "arguments, kind, message", ERRORS, ids=[f"{i}-{','.join(e[0])}" for i, e in enumerate(ERRORS)]
)
def test_errors_of_the_constructor(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SCANVAE(**(SIZES | arguments))


def test_pyro_draws_it():
    """`pyro.render_model` reads these relations; every parameter has a constraint."""
    vae = small_vae()
    relations = get_model_relations(vae.model, (random_cells(vae),))
    assert set(relations["observed"]) >= {"x"}
    assert set(relations["sample_sample"]["x"]) >= {"z"}
    assert set(relations["param_constraint"]) >= {"scanvae.z_encoder.mean.weight"}


# ---- the story without data ---------------------------------------------------------------------


def test_prior_draws_have_the_moments_of_the_factors():
    """4,000 cells; each figure is a mean that lies within five standard errors."""
    vae = small_vae(y_prior=[0.7, 0.2, 0.1], gene_likelihood="nb", n_batch=2)
    vae.dispersion.log_theta.data.fill_(2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = vae.prior(4000, batch=1, library=50.0)
    assert vae.training and set(drawn) == {"u", "y", "z", "x"}
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        "u": (4000, 4),
        "y": (4000, 3),
        "z": (4000, 4),
        "x": (4000, 20),
    }
    np.testing.assert_allclose(drawn["u"].mean(0), 0, atol=5 / 4000**0.5)
    np.testing.assert_allclose(drawn["y"].mean(0), vae.y_prior, atol=5 * 0.5 / 4000**0.5)
    # NB: the variance of a total is at most 50 + 50^2 / theta, theta = e^2.
    error = ((50 + 50**2 / np.exp(2)) / 4000) ** 0.5
    assert drawn["x"].sum(-1).mean().item() == pytest.approx(50, abs=5 * error)
    with torch.no_grad():
        normal = vae.eval().p_z(drawn["u"], drawn["y"], None)
    standard = (drawn["z"] - normal.base_dist.loc) / normal.base_dist.scale
    np.testing.assert_allclose(standard.mean(0), 0, atol=5 / 4000**0.5)


def test_prior_draws_of_a_latent_library_and_covariates():
    vae = small_vae(
        use_observed_lib_size=False,
        library_log_means=[3.0],
        library_log_vars=[0.04],
        n_continuous_cov=1,
        n_cats_per_cov=[2],
    ).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = vae.prior(4000)
    assert not vae.training
    log_library = drawn["l"].log()
    assert log_library.mean().item() == pytest.approx(3.0, abs=5 * 0.2 / 4000**0.5)
    assert log_library.std().item() == pytest.approx(0.2, rel=0.1)


def test_prior_draws_need_a_library_and_a_batch():
    with pytest.raises(InputError, match="give library="):
        small_vae().prior(3)
    with pytest.raises(InputError, match="batch holds codes from 2"):
        small_vae(n_batch=2).prior(3, batch=2, library=10.0)


# ---- hooks that SCANVAE itself leaves empty -----------------------------------------------------


class SharedFrequencies(SCANVAE):
    """One draw of label frequencies for all cells."""

    def p_shared(self):
        return {"pi": Dirichlet(torch.ones(self.n_labels))}

    def q_shared(self):
        return {"pi": Dirichlet(torch.tensor([5.0, 2.0, 1.0]))}

    def p_y(self, cells):
        return OneHotCategorical(cells.shared["pi"])


def test_a_shared_site_is_sampled_once_and_seen_by_the_factors():
    vae = SharedFrequencies(**SIZES)
    cells = random_cells(vae)
    guide = poutine.trace(vae.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(cells)
    pi = model.nodes["pi"]["value"]
    assert pi.shape == (3,) and torch.equal(pi, guide.nodes["pi"]["value"])
    assert [p.name for p in model.nodes["pi"]["cond_indep_stack"]] == []
    assert torch.allclose(model.nodes["y"]["fn"].probs, pi)
    assert cells.shared == {}


def test_the_point_of_a_posterior_without_a_mean_is_a_mean_of_draws():
    """exp(N(1, 0.1^2)) has the mean exp(1.005); 100 draws of it have an error of 0.027."""
    normal = Normal(torch.ones(6, 4), 0.1)
    pushed = TransformedDistribution(normal, [ExpTransform()]).to_event(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        point = small_vae().latent_point(pushed)
    np.testing.assert_allclose(point, np.exp(1.005), atol=5 * 0.028)
    assert torch.equal(small_vae().latent_point(normal.to_event(1)), normal.mean)


# ---- extra data ---------------------------------------------------------------------------------


class WithProtein(SCANVAE):
    """A Normal site of the extra data."""

    def observed(self, z, library, y, cells):
        p = pyro.distributions.Normal(z[..., : self.n_extra["protein"]], 1.0).to_event(1)
        return super().observed(z, library, y, cells) | {"protein": (p, cells.extra["protein"])}


def test_extra_data_have_their_width_and_are_drawn_without_data():
    vae = WithProtein(**SIZES, n_extra={"protein": 2})
    drawn = vae.prior(50, library=100.0)
    # Normal of variance 1: its square has mean 1 and variance 2; beyond 6 standard errors at 1e-8.
    away = drawn["protein"] - drawn["z"][:, :2]
    assert abs((away**2).mean() - 1) < 6 * (2 / 100) ** 0.5
    assert SCANVAE(**SIZES).n_extra == {}
    with pytest.raises(InputError, match=r"n_extra\['protein'\]=0, expected an integer"):
        WithProtein(**SIZES, n_extra={"protein": 0})


def test_extra_data_come_by_the_piecewise_interface():
    vae = WithProtein(**SIZES, n_extra={"protein": 2})
    x, protein = torch.ones(4, vae.n_input), torch.arange(8.0).reshape(4, 2)
    cells = vae.cells_from_tensors({"X": x, "protein": protein})
    assert cells.extra["protein"].equal(protein)
    with pytest.raises(InputError, match=r"extra data 'protein' has shape \(4, 3\), expected"):
        vae.cells(x, extra={"protein": torch.ones(4, 3)})
    with pytest.raises(InputError, match="these cells have no extra data 'protein', only: none"):
        vae.model(vae.cells(x))

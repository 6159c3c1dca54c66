"""What a modeller adds to model and guide is in every answer, or the answer is refused by name."""

import copy
import inspect

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, spline_autoregressive
from torch import nn
from torch.distributions import constraints, kl_divergence

from pyro_scanvi import SCANVAE, SCANVI, InputError, SemiSupervisedELBO
from pyro_scanvi.model.distributions import NegativeBinomial
from pyro_scanvi.model.likelihoods import GeneLikelihood
from pyro_scanvi.posterior.importance import log_joint
from tests.examples import SIZES, as_they_are, random_cells, simulated, small_model, small_vae

LONGEST = 20  # lines that a modeller writes


class SharedPi(SCANVAE):
    """Label frequencies with a Dirichlet prior and a Dirichlet posterior."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_concentration = nn.Parameter(torch.zeros(self.n_labels))

    def p_shared(self):
        return {"pi": dist.Dirichlet(torch.ones(self.n_labels))}

    def q_shared(self):
        return {"pi": dist.Dirichlet(self.log_concentration.exp())}

    def p_y(self, cells):
        return dist.OneHotCategorical(cells.shared["pi"])


class PerBatch(SCANVAE):
    """Label frequencies of each batch: p(y | s)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_pi = nn.Parameter(torch.tensor([[3.0, 0.0, -3.0], [-3.0, 0.0, 3.0]]))

    def p_y(self, cells):
        return dist.OneHotCategorical(logits=self.log_pi[cells.batch])


class Protein(SCANVAE):
    """A second modality, here the first three genes again, as Poisson counts of z."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_rate = nn.Linear(self.n_latent, 3)

    def observed(self, z, library, y, cells):
        protein = dist.Poisson(self.log_rate(z).exp()).to_event(1)
        return super().observed(z, library, y, cells) | {"protein": (protein, cells.x[:, :3])}


class FlowGuide(SCANVAE):
    """q(z | x) is pushed through an autoregressive flow, which has no mean in closed form."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.flow = affine_autoregressive(self.n_latent, hidden_dims=[8])

    def q_z(self, cells):
        return dist.TransformedDistribution(super().q_z(cells), [self.flow])


def poisson_lognormal(p):
    return PoissonLogNormal(p.mu)


class PoissonLogNormal(dist.TorchDistribution):
    """Poisson counts whose log rate has a standard deviation of one half about log mu."""

    arg_constraints = {"mu": constraints.positive}
    support = constraints.nonnegative_integer

    def __init__(self, mu):
        self.mu = mu
        super().__init__(mu.shape, validate_args=False)

    @property
    def mean(self):
        return self.mu * np.exp(1 / 8)

    def expand(self, batch_shape, _instance=None):
        return PoissonLogNormal(self.mu.expand(batch_shape))

    def sample(self, sample_shape=torch.Size()):
        noise = torch.randn(self.shape(sample_shape)) / 2
        return torch.poisson(self.mu * noise.exp())

    def log_prob(self, value):
        nodes = torch.tensor([-1.2247449, 0.0, 1.2247449])
        weights = torch.tensor([1.0, 4.0, 1.0]).div(6).log()
        rate = self.mu.unsqueeze(-1) * (nodes * 2**0.5 / 2).exp()
        return (dist.Poisson(rate).log_prob(value.unsqueeze(-1)) + weights).logsumexp(-1)


def batched():
    adata = simulated(60)
    adata.obs["batch"] = np.array(["one", "two"])[np.arange(60) % 2]
    return adata


def model_of(kind, **arguments):
    adata = batched()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    return SCANVI(adata, n_hidden=8, n_latent=3, module_class=kind, **arguments)


def trained(kind, **arguments):
    return model_of(kind, **arguments).train(2, batch_size=32, progress_bar=False)


QUESTIONS = {
    "labels": lambda m, **k: m.predict(soft=True),
    "Bayes' rule": lambda m, **k: m.predict(soft=True, method="bayes", n_mc_samples=5, **k),
    "latent": lambda m, **k: m.get_latent_representation(**k),
    "expression": lambda m, **k: m.get_normalized_expression(n_samples=2, **k),
    "parameters": lambda m, **k: m.get_likelihood_parameters(**k)["mean"],
    "predictive": lambda m, **k: m.posterior_predictive_sample(n_samples=2, **k),
    "correlation": lambda m, **k: m.get_feature_correlation_matrix(n_samples=2, **k),
    "ELBO": lambda m, **k: m.get_elbo(return_mean=False, **k),
    "reconstruction": lambda m, **k: m.get_reconstruction_error(return_mean=False, **k),
    "marginal": lambda m, **k: m.get_marginal_ll(n_mc_samples=5, return_mean=False, **k),
    "differential": lambda m, **k: m.differential_expression(
        groupby="batch", n_samples_overall=20, silent=True, **k
    )["bayes_factor"],
}
KINDS = {"shared": SharedPi, "by batch": PerBatch, "protein": Protein, "flow": FlowGuide}


@pytest.fixture(scope="module")
def models():
    return {name: trained(kind) for name, kind in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_is_answered_and_repeatable(models, kind, question):
    """Finite, and the same for a seed whatever was asked in between: nothing is remembered."""
    if (kind, question) == ("flow", "latent"):
        pytest.skip("draws for its mean: test_a_guide_without_a_mean")
    model, ask = models[kind], QUESTIONS[question]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = np.asarray(ask(model, **({} if question == "labels" else {"seed": 3})))
        model.get_elbo(indices=np.arange(10))
        model.posterior_predictive_sample(indices=[5])
        torch.manual_seed(1)
        again = np.asarray(ask(model, **({} if question == "labels" else {"seed": 3})))
    np.testing.assert_array_equal(first, again)
    if question != "correlation":  # a gene may not vary
        assert np.isfinite(first).all()


@pytest.mark.parametrize("kind", [*KINDS.values(), poisson_lognormal])
def test_what_a_modeller_writes_is_short(kind):
    assert len(inspect.getsource(kind).splitlines()) < LONGEST


# ---- sites that all cells share -----------------------------------------------------------------


def parts_of(vae, cells, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return SemiSupervisedELBO(vae.q_y, **settings).parts(vae.model, vae.guide, cells)


def test_a_shared_site_has_its_whole_kl_in_closed_form():
    vae = SharedPi(**SIZES).eval()
    cells = random_cells(vae, n_obs=600)
    kl = kl_divergence(vae.q_shared()["pi"], vae.p_shared()["pi"]).detach()
    vae.log_concentration.data += torch.tensor([1.0, 2.0, 0.5])
    kl = kl_divergence(vae.q_shared()["pi"], vae.p_shared()["pi"]).detach()
    parts = parts_of(vae, cells)
    assert parts.kl_shared["pi"].item() == pytest.approx(kl.item(), rel=1e-5)
    local = parts.reconstruction + sum(parts.kl.values())
    assert (-parts.elbo() - local).tolist() == pytest.approx([kl.item() / 600] * 12, rel=1e-2)
    half = parts_of(vae, cells, kl_weight=0.5).loss - parts_of(vae, cells, kl_weight=0).loss
    weighed = sum(parts.kl[site] for site in ("u", "y")).mean() + kl / 600
    assert half.item() == pytest.approx(0.5 * weighed.item(), rel=1e-3)


def test_its_gradient_is_zero_at_the_conjugate_answer():
    """All labels known: the posterior of pi is Dirichlet(1 + counts)."""
    vae = SharedPi(**SIZES).double().eval()
    cells = random_cells(vae, "all", n=24)
    counts = torch.bincount(cells.label, minlength=3).double()
    n_draws, elbo = 60, SemiSupervisedELBO(None)
    for at, is_zero in ((1 + counts, True), (100 * (1 + counts), False)):
        vae.log_concentration.data = at.log()
        gradients = []
        for seed in range(n_draws):
            torch.manual_seed(seed)
            loss = elbo.parts(vae.model, vae.guide, cells).loss
            gradients += torch.autograd.grad(loss, vae.log_concentration)
        found = torch.stack(gradients)
        deviations = found.mean(0).abs() / (found.std(0) / n_draws**0.5)
        # A mean of 60 lies beyond 6 standard errors with probability 1e-7; wrong ones lie at 10.
        assert bool((deviations < 6).all()) == is_zero


def test_history_and_elbo_hold_the_shared_kl(models):
    model = models["shared"]
    vae = model.module
    kl = kl_divergence(vae.q_shared()["pi"], vae.p_shared()["pi"]).item()
    last = model.history.iloc[-1]
    assert last["kl_shared"] > 0
    kls = [c for c in model.history if c.startswith("kl_")]
    assert last["elbo"] == pytest.approx(-last["reconstruction"] - last[kls].sum(), rel=1e-5)
    assert kl > 0
    found = model.get_elbo(return_mean=False, seed=0)
    plain = parts_of(vae, model._data[np.arange(60)], feed_labels=False)
    assert len(found) == 60 and list(plain.kl_shared) == ["pi"]


class SharedTheta(SCANVAE):
    """Inverse dispersions with a LogNormal prior and posterior."""

    def p_shared(self):
        return {"theta": dist.LogNormal(torch.zeros(self.n_input), 2.0).to_event(1)}

    def q_shared(self):
        return {"theta": dist.LogNormal(torch.full((self.n_input,), 0.7), 0.5).to_event(1)}

    def p_x(self, z, library, y, cells):
        rate = self.count_parameters(z, library, y, cells).mu
        return NegativeBinomial(rate, cells.shared["theta"]).to_event(1)


def test_the_kl_of_dispersions_is_in_the_elbo():
    """By hand: the KL of Normals of the logarithms, over 20 genes, a 60th of it a cell."""
    kl = 20 * (np.log(2.0 / 0.5) + (0.5**2 + 0.7**2) / (2 * 2.0**2) - 0.5)
    model = as_they_are(model_of(SharedTheta))
    vae, cells = model.module.eval(), model._data[np.arange(60)]
    parts = parts_of(vae, cells, feed_labels=False)
    assert parts.kl_shared["theta"].item() == pytest.approx(kl, rel=1e-5)
    local = -parts.reconstruction - sum(parts.kl.values())
    found = model.get_elbo(return_mean=False, seed=2)
    np.testing.assert_allclose(found, local - kl / 60, rtol=1e-4)
    trained_one = model_of(SharedTheta).train(1, batch_size=30, progress_bar=False)
    sharing = len(trained_one.train_indices)
    told = trained_one.history["kl_shared"].iloc[-1]
    assert told == pytest.approx(kl / sharing, rel=1e-4)


def test_a_warm_start_a_save_and_a_query_know_it(tmp_path):
    model = model_of(SharedPi).train(1, pretrain_epochs=1, batch_size=32, progress_bar=False)
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", batched(), module_class=SharedPi)
    assert again.get_elbo(seed=0) == model.get_elbo(seed=0)
    new = batched()
    new.obs["batch"] = "three"
    query = SCANVI.load_query_data(new, model)
    assert np.isfinite(query.train(1, progress_bar=False).get_elbo())


def test_bayes_rule_reads_the_shared_frequencies():
    """A pi that is nearly certain decides; p(y | x) without it does not."""
    model = as_they_are(small_model(simulated(30), module_class=SharedPi))
    model.module.log_concentration.data = torch.tensor([12.0, -5.0, -5.0])
    found = model.predict(soft=True, method="bayes", n_mc_samples=20, seed=0)
    assert (found.to_numpy()[:, 0] > 0.9).all()


# ---- p(y | batch) -------------------------------------------------------------------------------


def test_cells_are_asked_with_their_own_batch(models):
    """The same 40 cells get the same answer after others were asked."""
    model, chosen = models["by batch"], np.arange(0, 40)
    first = model.predict(indices=chosen, soft=True, method="bayes", n_mc_samples=9, seed=1)
    model.predict(indices=np.arange(20, 60), soft=True, method="bayes", n_mc_samples=3)
    again = model.predict(indices=chosen, soft=True, method="bayes", n_mc_samples=9, seed=1)
    assert first.equals(again)


# ---- a second modality --------------------------------------------------------------------------


def test_a_second_observed_site_is_a_reconstruction(models):
    history = models["protein"].history
    assert {"reconstruction_x", "reconstruction_protein"} <= set(history.columns)
    assert "kl_protein" not in history.columns
    last = history.iloc[-1]
    both = last["reconstruction_x"] + last["reconstruction_protein"]
    assert last["reconstruction"] == pytest.approx(both, rel=1e-6)


def test_any_observed_site_is_drawn_from(models):
    """Poisson counts at the rates that the model has at draws of z; other sites are refused."""
    model = models["protein"]
    drawn = model.posterior_predictive_sample(n_samples=400, site="protein", seed=0)
    assert drawn.shape == (60, 3, 400)
    vae, cells = model.module, model._data[np.arange(60)]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        rates = vae.log_rate(vae.q_z(cells).sample((4000,))).exp().mean(0)
    np.testing.assert_allclose(drawn.mean((0, 2)), rates.mean(0), rtol=0.1)
    assert model.posterior_predictive_sample(site="protein").shape == (60, 3)
    with pytest.raises(InputError, match="'protien' is not an observed site.*did you mean"):
        model.posterior_predictive_sample(site="protien")
    for site in ("z", "label"):  # what is known of a label is not drawn
        with pytest.raises(InputError, match=f"'{site}' is not an observed site"):
            model.posterior_predictive_sample(site=site)
    with pytest.raises(InputError, match="has no genes; leave it out"):
        model.posterior_predictive_sample(site="protein", gene_list=["gene1"])


def test_marginal_likelihood_is_of_both_modalities(models):
    """Nested sampling, exact over y, against the importance weights of whole traces."""
    vae = copy.deepcopy(models["protein"].module)
    vae.log_rate.weight.data *= 0.02  # so that the guide, which does not see it, is a fair proposal
    vae.log_rate.bias.data = models["protein"]._data[np.arange(60)].x[:, :3].mean(0).log()
    cells, n_draws = models["protein"]._data[np.arange(3)].hide_labels(), 20_000
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = log_joint(vae, cells, 4000, 5).logsumexp(-1)
        with pyro.plate("draws", n_draws, dim=-2):
            guide = poutine.trace(vae.guide).get_trace(cells)
            model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(cells)
        log_weights = _log_prob_of_cells(model) - _log_prob_of_cells(guide)
    expected = log_weights.double().logsumexp(0) - np.log(n_draws)
    # In 20 other seeds they are at most 0.8 apart; without the protein it would be 4 and more.
    torch.testing.assert_close(found, expected, atol=1.5, rtol=0)
    protein = vae.observed(guide.nodes["z"]["value"], cells.x.sum(-1, True), None, cells)["protein"]
    assert (protein[0].log_prob(protein[1]).mean(0) < -4).all()


def _log_prob_of_cells(trace):
    """Of all sites of the cells, unscaled; what is known of labels left out."""
    trace.compute_log_prob()
    sites = [s for n, s in trace.nodes.items() if s["type"] == "sample" and n != "label"]
    of_cells = [s for s in sites if "cells" in {p.name for p in s["cond_indep_stack"]}]
    return sum(s["unscaled_log_prob"] for s in of_cells)


# ---- guides and likelihoods of one's own --------------------------------------------------------


def test_a_guide_without_a_mean(models):
    """It is classified and shown at a mean of draws, which a seed repeats."""
    model = models["flow"]
    with pytest.raises(NotImplementedError):
        _ = model.module.q_z(model._data[np.arange(3)]).mean
    latent = [model.get_latent_representation(seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(latent[0], latent[1])
    assert np.abs(latent[0] - latent[2]).max() < 1.0 and (latent[0] != latent[2]).any()
    assert set(model.predict()) <= {"B", "NK", "T"}


def test_a_reported_mean_is_that_of_the_draws():
    """Not mu, which is an eighth of a log unit below it."""
    likelihood = GeneLikelihood(poisson_lognormal, uses_theta=False, uses_gate=False)
    model = as_they_are(small_model(simulated(30), gene_likelihood=likelihood))
    told = model.get_likelihood_parameters(n_samples=300, give_mean=True, seed=0)
    assert set(told) == {"mean"}
    drawn = model.posterior_predictive_sample(n_samples=300, seed=0).mean(-1)
    assert drawn.mean() == pytest.approx(told["mean"].mean(), rel=0.02)


def test_correlations_draw_from_the_models_own_likelihood():
    """And no "dispersion" is told of a likelihood that says of none."""
    drawn = []

    class Watched(PoissonLogNormal):
        def sample(self, sample_shape=torch.Size()):
            drawn.append(self.mu.shape)
            return super().sample(sample_shape)

        def expand(self, batch_shape, _instance=None):
            return Watched(self.mu.expand(batch_shape))

    likelihood = GeneLikelihood(lambda p: Watched(p.mu), uses_theta=False, uses_gate=False)
    model = as_they_are(small_model(simulated(30), gene_likelihood=likelihood))
    found = model.get_feature_correlation_matrix(n_samples=2, seed=0)
    assert drawn and found.shape == (20, 20)
    assert set(model.get_likelihood_parameters()) == {"mean"}


class SplineGuide(SCANVAE):
    """q(z | x) by a spline flow, which holds its network under two names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.flow = spline_autoregressive(self.n_latent, hidden_dims=[8], count_bins=4)

    def q_z(self, cells):
        return dist.TransformedDistribution(super().q_z(cells), [self.flow])


def test_a_spline_flow_is_saved_to_the_bit_and_takes_a_query(tmp_path):
    model = trained(SplineGuide)
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", batched(), module_class=SplineGuide)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name
    assert again.module.flow.arn is again.module.flow.spline.nn
    assert again.get_elbo(seed=0) == model.get_elbo(seed=0)
    new = batched()
    new.obs["batch"] = "three"
    query = SCANVI.load_query_data(new, tmp_path / "model", module_class=SplineGuide)
    assert np.isfinite(query.train(1, progress_bar=False).get_elbo(seed=0))
    kept = model.module.state_dict()["flow.arn.layers.0.weight"]
    assert torch.equal(query.module.state_dict()["flow.spline.nn.layers.0.weight"], kept)


# ---- refusals -----------------------------------------------------------------------------------


class OwnStory(SCANVAE):
    """A latent site of each cell that no hook knows."""

    def model(self, cells):
        with self.plate(cells):
            pyro.sample("w", dist.Normal(torch.zeros(len(cells)), 1.0))
            u, y = pyro.sample("u", self.p_u(cells)), self.one_hot_labels(cells)
            z = pyro.sample("z", self.p_z(u, y, cells))
            pyro.sample("x", self.p_x(z, self.observed_library(cells), y, cells), obs=cells.x)

    def guide(self, cells):
        with self.plate(cells):
            pyro.sample("w", dist.Normal(torch.ones(len(cells)), 1.0))
            z = pyro.sample("z", self.q_z(cells))
            y = pyro.sample("y", self.q_y(z, cells))
            pyro.sample("u", self.q_u(z, y, cells))


def test_what_an_answer_does_not_integrate_is_named():
    model = as_they_are(small_model(simulated(30), module_class=OwnStory))
    for ask in (model.get_marginal_ll, lambda: model.predict(method="bayes")):
        with pytest.raises(InputError, match="OwnStory: the guide draws y, which is no"):
            ask()
    with pytest.raises(InputError, match="the guide draws w too"):
        model.get_normalized_expression()
    assert model.posterior_predictive_sample().shape == (30, 20)


def test_nothing_is_left_on_the_module():
    vae = small_vae()
    before = set(vars(vae))
    cells = random_cells(vae)
    SemiSupervisedELBO(vae.q_y).parts(vae.model, vae.guide, cells)
    assert set(vars(vae)) == before and cells.shared == {}


def test_moments_that_are_not_known_are_refused(models):
    with pytest.raises(InputError, match="whose mean and variance are not known"):
        models["flow"].get_latent_representation(return_dist=True)

"""A user swaps a part of the model in a few lines; each swap trains, and changes the figures."""

import inspect

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, InputError, SemiSupervisedELBO
from pyro_scanvi.model.likelihoods import GeneLikelihood
from tests.examples import SIZES, random_cells, simulated, small_model

LONGEST_SWAP = 20  # lines


class HeavyTails(SCANVAE):
    """u has a Student t prior, whose KL from a Normal is not known in closed form."""

    def p_u(self, cells):
        return dist.StudentT(3.0, self.y_prior.new_zeros(self.n_latent), 1.0).to_event(1)


class LearnedMixture(SCANVAE):
    """u has a mixture of three Normals as its prior, with parameters of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.centres = nn.Parameter(torch.randn(3, self.n_latent))
        self.weights = nn.Parameter(torch.zeros(3))

    def p_u(self, cells):
        parts = dist.Normal(self.centres, 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.weights), parts)


class LaplaceGuide(SCANVAE):
    """q(z | x) is a Laplace distribution."""

    def q_z(self, cells):
        return dist.Laplace(*self.z_encoder(*self.encoder_input(cells))).to_event(1)


class FixedState(SCANVAE):
    """p(z | u, y) does not depend on u: a single Normal for each type."""

    def p_z(self, u, y, cells):
        return super().p_z(torch.zeros_like(u), y, cells)


class TemperedClassifier(SCANVAE):
    """q(y | z) with a learned temperature."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.tensor(3.0))

    def q_y(self, z, cells):
        return dist.OneHotCategorical(logits=super().q_y(z, cells).logits / self.temperature)


class UnsureLabels(SCANVAE):
    """Label frequencies are learned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frequencies = nn.Parameter(torch.tensor([1.0, 0.0, -1.0]))

    def p_y(self, cells):
        return dist.OneHotCategorical(logits=self.frequencies)


class SharedDispersion(nn.Module):
    """One inverse dispersion for all genes."""

    def __init__(self, sizes):
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(()))

    def forward(self, hidden, y, batch):
        return self.log_theta


def pyros_zinb(p):
    logits = p.mu.log() - p.theta.log()
    return dist.ZeroInflatedNegativeBinomial(p.theta, logits=logits, gate_logits=p.gate_logits)


def zero_inflated_poisson(p):
    return dist.ZeroInflatedPoisson(p.mu, gate_logits=p.gate_logits)


SWAPS = {
    "prior of u": (HeavyTails, {}),
    "learned prior of u": (LearnedMixture, {}),
    "guide of z": (LaplaceGuide, {}),
    "prior of z": (FixedState, {}),
    "classifier": (TemperedClassifier, {}),
    "learned prior of y": (UnsureLabels, {}),
    "prior of y": (SCANVAE, {"y_prior": [0.8, 0.1, 0.1]}),
    "dispersion": (SCANVAE, {"dispersion": SharedDispersion}),
    "likelihood": (
        SCANVAE,
        {"gene_likelihood": GeneLikelihood(zero_inflated_poisson, uses_theta=False)},
    ),
}


def make(kind, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**SIZES, **arguments)


def parts_of(vae, cells):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SemiSupervisedELBO(vae.q_y).parts(vae.model, vae.guide, cells)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swapped_part_trains_and_matters(swap):
    """Every parameter gets a gradient and moves; the loss is not that of the model as it comes."""
    kind, arguments = SWAPS[swap]
    vae = make(kind, **arguments)
    cells = random_cells(vae)
    losses = []
    adam = torch.optim.Adam(vae.parameters())
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    for _ in range(2):
        adam.zero_grad()
        loss = parts_of(vae, cells).loss
        loss.backward()
        adam.step()
        losses.append(loss.item())
    ours = make(SCANVAE)
    assert losses[0] != pytest.approx(parts_of(ours, cells).loss.item(), rel=1e-5)
    assert torch.tensor(losses).isfinite().all()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    "part", [k for k, _ in SWAPS.values() if k is not SCANVAE] + [SharedDispersion, pyros_zinb]
)
def test_a_swap_is_short(part):
    assert len(inspect.getsource(part).splitlines()) < LONGEST_SWAP


def test_unknown_kl_falls_back_to_monte_carlo():
    """log q(u) - log p(u) at the sample, by hand for a label that is known."""
    vae = make(HeavyTails).eval()
    cells = random_cells(vae, "all")
    kl = parts_of(vae, cells).kl["u"]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        z = vae.q_z(cells).rsample()
        y = torch.eye(3)[cells.label]
        q_u = vae.q_u(z, y, cells)
        u = q_u.mean + q_u.stddev * torch.randn(12, 4)  # one draw, as all are labelled
        student = torch.distributions.StudentT(3.0)
        expected = q_u.log_prob(u) - student.log_prob(u).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)


def test_pyros_zinb_is_ours():
    """As a callable of CountParameters; the same loss as the name "zinb"."""
    vae = make(SCANVAE, gene_likelihood=pyros_zinb)
    cells = random_cells(vae)
    expected = parts_of(make(SCANVAE), cells).loss
    torch.testing.assert_close(parts_of(vae, cells).loss, expected, rtol=1e-4, atol=0)


def test_an_own_classifier_is_asked_by_every_door():
    """Classification, objective and predictions see the temperature."""
    plain, vae = make(SCANVAE).eval(), make(TemperedClassifier).eval()
    vae.load_state_dict(plain.state_dict(), strict=False)
    cells = random_cells(vae)
    with torch.no_grad():
        expected = (plain.classify(cells.x).log_softmax(-1) / 3).softmax(-1)
        for logits in (vae.classify(cells.x), parts_of(vae, cells).logits):
            torch.testing.assert_close(logits.softmax(-1), expected)


# ---- in the estimator ---------------------------------------------------------------------------


class Sharper(SCANVAE):
    """Labels twice as sure, with a parameter and an argument of its own."""

    def __init__(self, *args, sharpness=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def q_y(self, z, cells):
        return dist.OneHotCategorical(logits=super().q_y(z, cells).logits * self.sharpness)


def test_an_own_class_in_the_estimator(tmp_path):
    """It trains, is saved, opened and mapped onto; another class is refused."""
    model = small_model(simulated(), module_class=Sharper, sharpness=3.0)
    assert isinstance(model.module, Sharper) and model.module.sharpness.item() == 3.0
    model.train(2, progress_bar=False)
    assert model.module.sharpness.item() != 3.0
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", simulated(), module_class=Sharper)
    assert (again.predict(soft=True) == model.predict(soft=True)).all(axis=None)
    with pytest.raises(InputError, match="saved from a Sharper, not a SCANVAE; .*module_class"):
        SCANVI.load(tmp_path / "model", simulated())
    with pytest.raises(InputError, match="saved from a Sharper"):
        SCANVI.load_query_data(simulated(), tmp_path / "model")
    query = SCANVI.load_query_data(simulated(), again)
    assert torch.equal(query.module.sharpness, again.module.sharpness)
    assert isinstance(query.module, Sharper)

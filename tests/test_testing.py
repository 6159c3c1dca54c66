"""Checks of a modeller's own parts: each fails on a part that breaks it, none on a right one."""

import numpy as np
import pytest
import torch
from pyro.distributions import Normal, OneHotCategorical, Poisson
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, testing
from pyro_scanvi.model.distributions import NegativeBinomial
from pyro_scanvi.model.growth import ByBatch, ByLabel, grows
from pyro_scanvi.model.likelihoods import GeneLikelihood
from pyro_scanvi.testing import Subject, check_dispersion, check_likelihood, check_model
from tests.estimator.test_extension import LearnedMixture, SharedDispersion, TemperedClassifier
from tests.estimator.test_story import FlowGuide, PerBatch, Protein, SharedPi, poisson_lognormal
from tests.training.test_contracts import BROKEN as WRONG_SHAPES


@pytest.fixture(scope="module")
def cells():
    return testing.random_cells()


# ---- right parts pass ---------------------------------------------------------------------------

SHIPPED = {
    "as it comes": {},
    "nb by label": {
        "gene_likelihood": "nb",
        "dispersion": "gene-label",
        "latent_distribution": "ln",
        "encode_covariates": True,
        "use_layer_norm": "both",
    },
}


@pytest.mark.parametrize("variant", SHIPPED)
def test_the_model_as_it_comes_passes(variant):
    check_model(**SHIPPED[variant])


@pytest.mark.parametrize("kind", [LearnedMixture, TemperedClassifier, SharedPi, FlowGuide, Protein])
def test_right_classes_pass_what_is_asked_of_traces(kind, cells):
    for check in testing.CHECKS_OF_TRACES:
        check(Subject(cells, kind))


def test_a_guide_without_a_mean_is_saved(cells):
    """What is classified at a mean of draws is compared at the same draws."""
    testing.it_is_saved(Subject(cells, FlowGuide))


def negative_binomial(p):
    return NegativeBinomial(p.mu, p.theta)


class RandomTheta(SCANVAE):
    """A dispersion with a prior: what a PyroSample inside a part is refused for, done right."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loc = nn.Parameter(torch.zeros(self.n_input))
        self.log_scale = nn.Parameter(torch.full((self.n_input,), -2.0))

    def p_shared(self):
        return {"log_theta": Normal(torch.zeros_like(self.loc), 1.0).to_event(1)}

    def q_shared(self):
        return {"log_theta": Normal(self.loc, self.log_scale.exp()).to_event(1)}

    def p_x(self, z, library, y, cells):
        mu = self.count_parameters(z, library, y, cells).mu
        return NegativeBinomial(mu, cells.shared["log_theta"].exp()).to_event(1)


def test_a_random_dispersion_passes():
    check_model(RandomTheta, gene_likelihood="poisson")  # which owns neither theta nor a gate


def test_right_likelihoods_and_dispersions_pass():
    check_likelihood(GeneLikelihood(negative_binomial, uses_gate=False))
    check_dispersion(SharedDispersion)


def test_cells_of_ones_own(cells):
    """With what the random ones lack, here size factors, and without batches; other arguments."""
    adata = cells.copy()
    adata.obs["size"] = adata.X.sum(1)
    SCANVI.setup_anndata(adata, "label", "Unknown", size_factor_key="size")
    groups = {"labels_groups": [0, 0, 1], "use_labels_groups": True, "linear_classifier": False}
    check_model(adata=adata, gene_likelihood="poisson", n_layers=2, **groups)
    with pytest.raises(AssertionError, match="log_pi"):
        testing.it_grows(Subject(adata, Unruled))


# ---- and broken ones do not ---------------------------------------------------------------------


class WithoutRsample(Normal):
    has_rsample = False


class FirstLabel(SCANVAE):
    """As one reads a single label: under enumeration it finds the first for all."""

    def p_z(self, u, y, cells):
        p = super().p_z(u, y, cells).base_dist
        return Normal(p.loc + y.argmax(), p.scale).to_event(1)


class Score(SCANVAE):
    def q_u(self, z, y, cells):
        q = super().q_u(z, y, cells).base_dist
        return WithoutRsample(q.loc, q.scale).to_event(1)


class Idle(SCANVAE):
    """A parameter that nothing reads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(2))


class Cut(Idle):
    """One that is read behind a detach."""

    def p_u(self, cells):
        return Normal(torch.zeros(self.n_latent), self.idle.detach().exp().mean()).to_event(1)


class Root(Idle):
    """The gradient of a root at 0."""

    def p_u(self, cells):
        return Normal(torch.zeros(self.n_latent), 1 + self.idle.sqrt().mean()).to_event(1)


class Remembers(SCANVAE):
    def q_z(self, cells):
        self.last = super().q_z(cells)
        return self.last


class Counts(SCANVAE):
    """Each call is a little surer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0

    def q_y(self, z, cells):
        self.calls += 1
        return OneHotCategorical(logits=super().q_y(z, cells).logits * self.calls)


class Moves(SCANVAE):
    """A statistic that moves in eval mode too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("centre", torch.zeros(self.n_latent))

    def p_z(self, u, y, cells):
        self.centre += u.detach().mean().item() / 10
        return super().p_z(u, y, cells)


class Normalised(SCANVAE):
    """z is centred over the cells of the minibatch."""

    def q_z(self, cells):
        q = super().q_z(cells).base_dist
        return Normal(q.loc - q.loc.mean(0), q.scale).to_event(1)


class Mixed(SCANVAE):
    """Expression is softened over cells instead of genes: no batch shape is wrong."""

    def p_x(self, z, library, y, cells):
        p = self.count_parameters(z, library, y, cells)
        return Poisson(library * (p.rho + 1e-3).log().softmax(-2)).to_event(1)


class WrongMean(NegativeBinomial):
    @property
    def mean(self):
        return 1.05 * self.mu


class Unnormalised(NegativeBinomial):
    def log_prob(self, value):
        return super().log_prob(value) + 0.1


class NoMean(NegativeBinomial):
    @property
    def mean(self):
        raise NotImplementedError


class NotFinite(SCANVAE):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("log_of_zero", torch.zeros(1).log())


class OnlyInEval(SCANVAE):
    def q_z(self, cells):
        if self.training:
            raise RuntimeError("not in training")
        return super().q_z(cells)


class Unsaved(SCANVAE):
    """A moving statistic that is no buffer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = 1.0

    def q_y(self, z, cells):
        self.seen += 0.1 * self.training
        return OneHotCategorical(logits=super().q_y(z, cells).logits * self.seen)


class NoArguments(SCANVAE):
    """What the constructor makes depends on something else than its arguments."""

    made = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        NoArguments.made += 1
        self.weight = nn.Parameter(torch.ones(NoArguments.made))

    def p_u(self, cells):
        return Normal(torch.zeros(self.n_latent), self.weight.mean().exp()).to_event(1)


class Unruled(SCANVAE):
    """A parameter by label without a rule of growth."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_pi = nn.Parameter(torch.zeros(self.n_labels))

    def p_y(self, cells):
        return OneHotCategorical(logits=self.log_pi)


class StartsAnew(SCANVAE):
    """A new batch makes the shifts of the old ones be forgotten."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(torch.arange(self.n_batch) / self.n_batch)
        grows(self, shift=ByBatch(dim=0, start=lambda old, own: own))

    def q_z(self, cells):
        q = super().q_z(cells).base_dist
        return Normal(q.loc + self.shift[cells.batch, None], q.scale).to_event(1)


class LosesALabel(SCANVAE):
    """The classifier does not grow: probabilities of three labels, whatever there are."""

    def q_y(self, z, cells):
        return OneHotCategorical(logits=super().q_y(z, cells).logits[..., :3])


class Sneaky(SharedDispersion):
    """By label, and says that it is not."""

    reads_label = False

    def __init__(self, sizes):
        super().__init__(sizes)
        self.log_theta = nn.Parameter(torch.arange(float(sizes.n_labels)))
        grows(self, log_theta=ByLabel(dim=0))

    def forward(self, hidden, y, batch):
        return (y @ self.log_theta).unsqueeze(-1)


class Transposed(SharedDispersion):
    def forward(self, hidden, y, batch):
        return self.log_theta.expand(13, len(batch))


def of_likelihood(distribution, **more):
    def likelihood(p):
        return distribution(p.mu, p.theta)

    return {"gene_likelihood": GeneLikelihood(likelihood, uses_gate=False, **more)}


CASES = {  # check, class or arguments, what is said
    "score": ("posterior_is_reparameterised", Score, "q_u of class Score draws site 'u' from a Wi"),
    "idle": (
        "gradients_reach_all",
        Idle,
        r"Idle\(\): 1 parameters get no gradient \(idle\), expec",
    ),
    "cut": ("gradients_reach_all", Cut, r"get no gradient \(idle\)"),
    "root": ("gradients_reach_all", Root, r"gradients of 1 parameters are not finite \(idle\)"),
    "gate": (
        "gradients_reach_all",
        {"gene_likelihood": negative_binomial},
        r"gene_likelihood=negative_binomial\): 2 .*\(x_decoder.gate.weight, .*uses_gate=False",
    ),
    "remembers": (
        "evaluation_is_repeatable",
        Remembers,
        r"Remembers\(\): last was left on the mod",
    ),
    "counts": ("evaluation_is_repeatable", Counts, "in eval mode, its ELBO differs"),
    "moves": ("evaluation_is_repeatable", Moves, "in eval mode, centre moved"),
    "normalised": ("cells_stand_alone", Normalised, "q_z of class Normalised: the log probability"),
    "mixed": ("cells_stand_alone", Mixed, "p_x of class Mixed: .*in a minibatch of 8 cells and"),
    "mean": (
        "means_are_those_of_draws",
        of_likelihood(WrongMean),
        "p_x of class SCANVAE in SCANVAE.gene_likelihood.*the mean that its",
    ),
    "lognormal": (
        "means_are_those_of_draws",
        {"gene_likelihood": lambda p: TooWide(p.mu)},
        "mend its mean or its sample",
    ),
    "sum": ("counts_sum_to_one", of_likelihood(Unnormalised), r"sum to 1\.105\d, expected 1"),
    "not finite": ("it_trains", NotFinite, "after an epoch log_of_zero is not finite"),
    "training": ("it_trains", OnlyInEval, r"cannot be trained: q_z of class OnlyInEval: not in tr"),
    "unsaved": ("it_is_saved", Unsaved, r"saved and opened by load its ELBO is .*register_buffer"),
    "arguments": (
        "it_is_saved",
        NoArguments,
        "cannot be saved and opened: Error.*state_dict for NoArg",
    ),
    "no rule": ("it_grows", Unruled, "cannot be mapped onto .*log_pi has shape .*is no rule"),
    "anew": ("it_grows", StartsAnew, "old cells move by up to .* in the latent space"),
    "loses": ("it_grows", LosesALabel, r"LosesALabel\(\) cannot be mapped.*\(60, 3\)"),
    "no mean": (
        "likelihood_tells_its_parameters",
        of_likelihood(NoMean),
        "NoMean does not tell it",
    ),
    "first label": (
        "labels_stand_alone",
        FirstLabel,
        r"p_z of class FirstLabel: with all labels .* site 'z' of .* label 1 .*argmax\(-1\)",
    ),
    "told": (
        "likelihood_tells_its_parameters",
        of_likelihood(NegativeBinomial, parameters=lambda p: {"mean": p.mean.sum(-1)}),
        r"'mean' has shape \(17,\), expected that of the counts, \(17, 13\)",
    ),
    "sneaky": (
        "dispersion_fits",
        {"dispersion": Sneaky},
        "dispersion Sneaky differs between label",
    ),
    "transposed": (
        "dispersion_fits",
        {"dispersion": Transposed},
        r"shape \(13, 17\), expected one",
    ),
}


class TooWide(type(poisson_lognormal(type("P", (), {"mu": torch.ones(1)})))):
    """Its draws are those of twice the standard deviation that its mean is of."""

    def sample(self, sample_shape=torch.Size()):
        noise = torch.randn(self.shape(sample_shape))
        return torch.poisson(self.mu * noise.exp())

    def expand(self, batch_shape, _instance=None):
        return TooWide(self.mu.expand(batch_shape))


@pytest.mark.parametrize("case", CASES)
def test_a_broken_part_fails_its_check(case, cells):
    check, broken, message = CASES[case]
    arguments = broken if isinstance(broken, dict) else {}
    kind = SCANVAE if arguments else broken
    with pytest.raises(AssertionError, match=message):
        getattr(testing, check)(Subject(cells, kind, arguments))


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shapes_fail(case, cells):
    """As in training."""
    broken, message = WRONG_SHAPES[case]
    arguments = broken if isinstance(broken, dict) else {}
    kind = SCANVAE if arguments else broken
    with pytest.raises(AssertionError, match=message.replace("4,", "5,")):
        testing.shapes_fit(Subject(cells, kind, arguments))


def test_every_check_has_a_broken_part():
    tables = (testing.CHECKS, testing.CHECKS_OF_LIKELIHOODS, testing.CHECKS_OF_DISPERSIONS)
    checks = {check.__name__ for table in tables for check in table}
    assert checks == {check for check, *_ in CASES.values()} | {"shapes_fit"}


def test_the_first_broken_check_is_told():
    with pytest.raises(AssertionError, match="Idle"):
        check_model(Idle)
    with pytest.raises(AssertionError, match="expected 1"):
        check_likelihood(of_likelihood(Unnormalised)["gene_likelihood"])
    with pytest.raises(AssertionError, match="Sneaky"):
        check_dispersion(Sneaky)


def test_the_test_of_means_has_the_false_alarms_that_it_says():
    """Standardised differences of 50 seeds, 650 in all, are as large as those of normals.

    A right test would fail so for one choice of the seeds in 200.
    """
    fn = NegativeBinomial(torch.full((17, 13), 5.0), torch.tensor(0.5)).to_event(1)
    largest = 0.0
    for seed in range(50):
        torch.manual_seed(seed)
        drawn = fn.sample((200,))
        spread = (drawn.var(0).mean(0) / (200 * 17)).sqrt()
        largest = max(largest, ((drawn.mean((0, 1)) - 5).abs() / spread).max().item())
    assert 2.0 < largest < 4.5
    told = fn.mean
    testing._check_mean("it", told, drawn, 1)
    limit = 5.5 * np.sqrt((5 + 25 / 0.5) / (200 * 17))
    with pytest.raises(AssertionError, match="expected the same"):
        testing._check_mean("it", told + 1.5 * limit, drawn, 1)


def test_subjects_name_their_parts(cells):
    subject = Subject(cells, PerBatch, {"gene_likelihood": negative_binomial, "n_hidden": 3})
    assert subject.name == "PerBatch(gene_likelihood=negative_binomial)"

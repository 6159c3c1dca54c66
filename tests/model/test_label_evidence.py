"""What is known of a label, against sums written out by hand, in float64."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.distributions import OneHotCategorical
from scipy.special import digamma, gammaln

from pyro_scanvi import SCANVAE, InputError, SemiSupervisedELBO
from pyro_scanvi.data.minibatches import LOG_IMPOSSIBLE, UNLABELED
from pyro_scanvi.model.label_noise import (
    SITE,
    FixedNoise,
    LabelSizes,
    LearnedNoise,
    NoNoise,
    RateNoise,
    checked_confusion,
    safe_log,
)
from pyro_scanvi.model.objective import classification_cost
from pyro_scanvi.model.objectives import ImportanceWeightedELBO
from tests.examples import SIZES, random_cells, small_vae
from tests.model.test_objective import (
    MODELS,
    double_vae,
    kl_normal,
    log_normal,
    log_zinb,
    noise,
    one,
    seeded_parts,
)

ONE = [[0.8, 0.15, 0.05], [0.1, 0.9, 0.0], [0.3, 0.1, 0.6]]
TWO = [ONE, [[0.5, 0.2, 0.3], [0.05, 0.9, 0.05], [0.0, 0.4, 0.6]]]
SETS = [[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]]  # which labels each of four cells may have
SOFT = [[0.7, 0.2, 0.1], [0.5, 0.0, 0.5], [0.01, 0.01, 0.98], [1, 1, 1]]  # 1: not known


def told(rows, n=12) -> torch.Tensor:
    """p(what is known | given label) of each cell, (N, L)."""
    return torch.tensor([rows[i % len(rows)] for i in range(n)], dtype=torch.float64)


def evidence_of(chances: torch.Tensor) -> torch.Tensor:
    return torch.where(chances > 0, chances.clamp(min=1e-300).log(), LOG_IMPOSSIBLE)


def rated(right: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(3).double()
    return torch.stack([r * eye + (1 - r) / 2 * (1 - eye) for r in right])


# Rows of the first annotator, whether there is a second one, label noise, its matrices by hand.
CASES = {
    "sets": (SETS, False, "none", None),
    "soft": (SOFT, False, "none", None),
    "fixed": (SETS, False, partial(FixedNoise, matrix=ONE), lambda _: torch.tensor([ONE])),
    "two annotators": (SOFT, True, partial(FixedNoise, matrix=TWO), lambda _: torch.tensor(TWO)),
    "rate": (SETS, True, "rate", lambda vae: rated(1 / (1 + (-vae.label_noise.right_logit).exp()))),
    "learned": (
        SOFT,
        True,
        "learned",
        lambda vae: vae.label_noise.logits.exp() / vae.label_noise.logits.exp().sum(-1)[..., None],
    ),
}


def case_of(name):
    """A model, cells, and p(e | y) of each by hand, (N, L), a function of the model."""
    rows, second, label_noise, matrices = CASES[name]
    arguments = {"label_noise": label_noise, "n_annotators": 1 + second} | MODELS["rich"]
    vae = double_vae(seed=1, **arguments)
    first = told(rows)
    cells = random_cells(vae, "none", n_obs=100)
    exact = first.sum(-1) == 1
    label = torch.where(exact & (first == 1).any(-1), first.argmax(-1), UNLABELED)
    annotations = (torch.arange(12) % 4 - 1).unsqueeze(-1) if second else None
    cells = replace(cells, label=label, evidence=evidence_of(first), annotations=annotations)
    given = [first] if annotations is None else [first, told([[1, 1, 1], *torch.eye(3).tolist()])]

    def chances(vae):
        product = torch.ones(12, 3, dtype=torch.float64)
        if matrices is None:
            return first
        for says, matrix in zip(given, matrices(vae).double(), strict=True):
            for cell in range(12):
                if (says[cell] == 1).all():  # this annotator says nothing
                    continue
                factors = [sum(matrix[y, k] * says[cell, k] for k in range(3)) for y in range(3)]
                product[cell] *= torch.stack(factors)
        return product

    return vae, cells, chances


def loss_by_hand(vae, cells, chance, kl_weight, ratio):
    """Label by label, with q(y | z, e) and -log p(e | y) spelt out."""
    batch = one(cells.batch, 2)
    loc, scale = vae.z_encoder((1 + cells.x).log(), batch)
    z_noise, u_noise, l_noise = noise(vae, len(cells))
    z = loc + scale * z_noise
    l_loc, l_scale = vae.l_encoder((1 + cells.x).log(), batch)
    m, v = vae.library_log_means[cells.batch], vae.library_log_vars[cells.batch]
    kl_l = kl_normal(l_loc, l_scale, m[:, None], v[:, None].sqrt())
    hidden = vae.x_decoder(z, batch)
    mu = (l_loc + l_scale * l_noise).exp() * vae.x_decoder.expression(hidden)
    joint = vae.classifier(z).softmax(-1) * chance
    q = joint / joint.sum(-1, keepdim=True)
    total = 0.0
    for y in range(3):
        possible = chance[:, y] > 0
        one_hot = one(torch.full_like(cells.label, y), 3)
        u_loc, u_scale = vae.u_encoder(z, one_hot)
        u = u_loc + u_scale * u_noise[y]
        kl_u = kl_normal(u_loc, u_scale, torch.zeros_like(u), torch.ones_like(u))
        kl_y = torch.where(possible, q[:, y], 1.0).log() - vae.y_prior[y].log()
        cost = -log_zinb(cells.x, mu, vae.dispersion.log_theta.exp()[y], vae.x_decoder.gate(hidden))
        cost = cost + log_normal(z, loc, scale) - log_normal(z, *vae.z_decoder(u, one_hot))
        cost = cost - torch.where(possible, chance[:, y], 1.0).log()
        total = total + q[:, y] * (cost + kl_weight * (kl_u + kl_y + kl_l))
    wrong = -(vae.classifier(loc).softmax(-1) * chance).sum(-1).log()
    known = ~(chance == 1).all(-1)
    # Two means: of exact labels, and of what else is known.
    kinds = [wrong[known & kind] for kind in (cells.labelled, ~cells.labelled)]
    return total.mean() + ratio * sum(costs.mean() for costs in kinds if len(costs))


def assert_same_gradients(vae, found, expected, tolerance):
    """Of every parameter, relative to its largest entry."""
    parameters = dict(vae.named_parameters())
    grads = [
        torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        for loss in (found, expected)
    ]
    for name, gradient, by_hand in zip(parameters, *grads, strict=True):
        assert (gradient is None) == (by_hand is None), name
        if by_hand is not None:
            error = (gradient - by_hand).abs().max()
            assert error <= tolerance * by_hand.abs().max(), name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_equals_the_sum_by_hand(name, kl_weight):
    vae, cells, chances = case_of(name)
    elbo = SemiSupervisedELBO(vae.q_y, 7.0, kl_weight=kl_weight, evidence=vae.evidence)
    found = seeded_parts(elbo, vae, cells).loss
    expected = loss_by_hand(vae, cells, chances(vae), kl_weight, 7.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert_same_gradients(vae, found, expected, 1e-8)


@pytest.mark.parametrize("name", ["fixed", "two annotators", "rate", "learned"])
def test_the_gradient_of_the_evidence_is_finite(name):
    """Some of it is impossible, as some probabilities of the matrices are 0."""
    vae, cells, _ = case_of(name)
    seeded_parts(SemiSupervisedELBO(vae.q_y, evidence=vae.evidence), vae, cells).loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)
    assert all(p.grad.abs().max() > 0 for p in vae.label_noise.parameters())


class AsBefore(SCANVAE):
    """Labels are not looked at."""

    def q_y_given(self, z, cells):
        return self.q_y(z, cells)

    def evidence(self, cells):
        return cells.x.new_zeros(len(cells), self.n_labels)


@pytest.mark.parametrize("how", ["hidden", "not fed", "zeros"])
def test_hidden_labels_are_as_no_evidence(how):
    """Value to 1e-15; gradients to 1e-12, as probabilities are normalised once more."""
    vae, cells, _ = case_of("sets")
    plain = AsBefore(**SIZES, **MODELS["rich"]).double().eval()
    plain.load_state_dict(vae.state_dict())
    seen = {
        "hidden": cells.hide_labels(),
        "not fed": cells,
        "zeros": replace(cells.hide_labels(), evidence=torch.zeros(12, 3).double()),
    }[how]
    elbo = SemiSupervisedELBO(None, feed_labels=how != "not fed")
    found = seeded_parts(elbo, vae, seen).loss
    expected = seeded_parts(SemiSupervisedELBO(None), plain, cells).loss
    torch.testing.assert_close(found, expected, rtol=2e-15, atol=0)
    pairs = zip(vae.named_parameters(), plain.parameters(), strict=True)
    found.backward()
    expected.backward()
    for (name, parameter), other in pairs:
        error = (parameter.grad - other.grad).abs().max()
        assert error <= 1e-12 * other.grad.abs().max(), name


def test_exact_labels_are_evidence_to_the_bit():
    """As codes, and as a matrix of evidence."""
    vae = double_vae(seed=1, **MODELS["rich"])
    cells = random_cells(vae, "mixed")
    chance = torch.where(cells.labelled[:, None], one(cells.label.clamp(min=0), 3), 1.0)
    matrix = replace(cells.hide_labels(), evidence=evidence_of(chance))
    elbo = SemiSupervisedELBO(vae.q_y, 7.0)
    losses = [seeded_parts(elbo, vae, seen).loss for seen in (cells, matrix)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, list(vae.parameters())) for loss in losses]
    assert all(map(torch.equal, *gradients))


# ---- the classification term ------------------------------------------------------------------


def test_classification_is_minus_log_of_the_set():
    q_y = OneHotCategorical(torch.tensor([[0.5, 0.3, 0.2]] * 4).double())
    chance = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0.8, 0.1, 0.3]]).double()
    cost, informative = classification_cost(q_y, evidence_of(chance))
    expected = -torch.tensor([1.0, 0.8, 0.2, 0.4 + 0.03 + 0.06]).double().log()
    torch.testing.assert_close(cost, expected)
    assert cost[0] == 0 and informative.tolist() == [False, True, True, True]


@pytest.mark.parametrize("evidence", [[0.0, LOG_IMPOSSIBLE, LOG_IMPOSSIBLE], [-3.0, -0.1, 0.0]])
def test_classification_has_finite_gradients(evidence):
    """The label is one whose probability is 0 in float32."""
    logits = torch.tensor([[-500.0, 0.0, 500.0]], requires_grad=True)
    cost, _ = classification_cost(OneHotCategorical(logits=logits), torch.tensor([evidence]))
    cost.sum().backward()
    assert cost.isfinite().all() and logits.grad.isfinite().all()


def test_labels_as_given_where_no_evidence_is_named():
    """The objective's own default sums what annotators say, and knows no noise."""
    vae, cells, _ = case_of("two annotators")
    found = seeded_parts(SemiSupervisedELBO(vae.q_y), vae, cells).classification
    given = told(SOFT) * told([[1, 1, 1], *torch.eye(3).tolist()])
    q = vae.classifier(vae.z_encoder((1 + cells.x).log(), one(cells.batch, 2))[0]).softmax(-1)
    some = given.sum(-1) > 0
    torch.testing.assert_close(found[some], -(q * given).sum(-1)[some].log().detach())


def test_a_minibatch_without_any_evidence_has_no_classification_term():
    vae = double_vae()
    parts = seeded_parts(SemiSupervisedELBO(vae.q_y), vae, random_cells(vae, "none"))
    assert parts.classification.sum() == 0 and not parts.informative.any()


def test_cells_with_sets_count_by_their_weight_and_where_they_are_chosen():
    """In the classification term; cells of which nothing is known do not."""
    vae, cells, chances = case_of("sets")
    weight = torch.arange(1.0, 13.0).double()
    classified = torch.arange(12) % 5 != 0
    seen = replace(cells, weight=weight, classified=classified)
    elbo = SemiSupervisedELBO(vae.q_y, 7.0)
    bare = SemiSupervisedELBO(vae.q_y, 0.0)
    found = seeded_parts(elbo, vae, seen).loss - seeded_parts(bare, vae, seen).loss
    q = vae.classifier(vae.z_encoder((1 + cells.x).log(), one(cells.batch, 2))[0]).softmax(-1)
    wrong = -(q * chances(vae)).sum(-1).log()
    counted = weight * classified * (chances(vae).sum(-1) < 3)
    kinds = [counted * kind for kind in (cells.labelled, ~cells.labelled)]
    means = [(weights * wrong).sum() / weights.sum() for weights in kinds]
    torch.testing.assert_close(found, 7 * sum(means))


def test_the_importance_weighted_bound_sums_over_the_set():
    """With the same draws, exp(bound) of a set is the sum of those of its labels."""
    vae, cells, _ = case_of("sets")
    elbo = ImportanceWeightedELBO(vae.q_y, num_particles=4)

    def bounds(chance):
        seen = replace(cells.hide_labels(), evidence=evidence_of(chance))
        return seeded_parts(elbo, vae, seen).bounds

    # Not quite certain: cells that all are would be drawn for one label alone.
    one_hots = torch.eye(3).double().clamp(min=1e-30)
    exact = torch.stack([bounds(one_hots[y].expand(12, 3)) for y in range(3)], -1)
    expected = (exact + evidence_of(told(SETS))).logsumexp(-1)
    torch.testing.assert_close(bounds(told(SETS)), expected)


# ---- a posterior of the matrices --------------------------------------------------------------


def dirichlet_vae():
    vae = double_vae(label_noise="dirichlet", n_annotators=2)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        vae.label_noise.log_concentration += torch.rand(2, 3, 3, generator=rng, dtype=torch.float64)
    return vae


def kl_dirichlet(a, b):
    """Of one row, in closed form."""
    a, b = (np.asarray(x, dtype=float) for x in (a, b))
    value = gammaln(a.sum()) - gammaln(a).sum() - gammaln(b.sum()) + gammaln(b).sum()
    return value + ((a - b) * (digamma(a) - digamma(a.sum()))).sum()


def annotated(vae, n_obs=100):
    codes = torch.arange(12) % 4 - 1
    return replace(random_cells(vae, "mixed", n_obs=n_obs), annotations=codes.unsqueeze(-1))


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_dirichlet_noise_costs_its_kl_once(kl_weight):
    vae = dirichlet_vae()
    elbo = SemiSupervisedELBO(vae.q_y, 0, kl_weight=kl_weight, evidence=vae.evidence)
    parts = seeded_parts(elbo, vae, annotated(vae))
    noise_of = vae.label_noise
    learned = noise_of.log_concentration.exp().detach().flatten(0, 1)
    kl = sum(map(kl_dirichlet, learned, noise_of.prior.flatten(0, 1)))
    assert parts.kl_shared[SITE].item() == pytest.approx(kl, rel=1e-8)
    local = parts.kl["z"] + kl_weight * (parts.kl["u"] + parts.kl["y"]) + parts.reconstruction
    expected = local.mean().item() + kl_weight * kl / 100
    assert parts.loss.item() == pytest.approx(expected, rel=1e-8)


def test_dirichlet_noise_is_that_of_the_draw():
    """Its evidence by hand, at the matrices and the z that the guide draws."""
    vae = dirichlet_vae()
    cells = annotated(vae)
    elbo = SemiSupervisedELBO(vae.q_y, 7.0, evidence=vae.evidence)
    parts = seeded_parts(elbo, vae, cells)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = poutine.trace(vae.guide).get_trace(cells).nodes
    matrices = drawn[SITE]["value"]
    chance = torch.ones(12, 3, dtype=torch.float64)
    for matrix, codes in zip(matrices, (cells.label, cells.annotations[:, 0]), strict=True):
        for cell in (codes >= 0).nonzero().flatten():
            chance[cell] *= matrix[:, codes[cell]]
    joint = vae.classifier(drawn["z"]["value"]).softmax(-1) * chance
    q = joint / joint.sum(-1, keepdim=True)
    found = parts.reconstructions["label"]
    torch.testing.assert_close(found, -(q * chance.log()).sum(-1).detach())
    parts.loss.backward()
    assert vae.label_noise.log_concentration.grad.abs().min() > 0


@pytest.mark.parametrize("draws", [(), (1,), (5,)])
def test_shapes_of_drawn_noise(draws):
    """As questions draw it, with a dimension in the place of the cells."""
    vae = dirichlet_vae()
    cells = annotated(vae)
    between = (1,) if draws else ()
    shared = {SITE: vae.q_shared()[SITE].sample((*draws, *between))}
    found = vae.evidence(replace(cells, shared=shared))
    assert tuple(found.shape) in {(*draws, 12, 3), (12, 3)}
    value = shared[SITE].reshape(-1, 2, 3, 3)[0]
    first = vae.evidence(replace(cells, shared={SITE: value}))
    torch.testing.assert_close(found.reshape(-1, 12, 3)[0], first)


def test_questions_see_the_mean_of_the_matrices():
    vae = dirichlet_vae()
    cells = vae.at_shared_points(annotated(vae))
    counts = vae.label_noise.log_concentration.exp()
    torch.testing.assert_close(cells.shared[SITE], counts / counts.sum(-1, keepdim=True))
    assert double_vae().at_shared_points(cells) is cells


# ---- parts, and what they refuse ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [RateNoise, LearnedNoise])
@pytest.mark.parametrize("start", [0.6, 0.95])
def test_rows_sum_to_one(kind, start):
    noise_of = kind(LabelSizes(4, 3), start=start)
    confusion = noise_of.confusion({})
    assert confusion.shape == (3, 4, 4)
    torch.testing.assert_close(confusion.sum(-1), torch.ones(3, 4))
    torch.testing.assert_close(confusion.diagonal(dim1=-2, dim2=-1), torch.full((3, 4), start))


def test_one_matrix_serves_all_annotators():
    noise_of = FixedNoise(LabelSizes(3, 2), np.array(ONE))
    assert torch.equal(noise_of.matrix[0], noise_of.matrix[1])
    assert "matrix" in noise_of.state_dict() and not list(noise_of.parameters())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(2), r"has shape \(2, 2\), expected \(3, 3\)"),
        (torch.eye(3).expand(4, 3, 3), r"has shape \(4, 3, 3\)"),
        (torch.ones(3, 3), "sum to 1"),
        (torch.tensor([[2.0, -1, 0], [0, 1, 0], [0, 0, 1]]), "are probabilities"),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(matrix, message):
    with pytest.raises(InputError, match=message):
        checked_confusion(matrix, LabelSizes(3, 2))


def test_annotators_without_noise_are_refused():
    with pytest.raises(InputError, match="label_noise='rate'"):
        NoNoise(LabelSizes(3, 2))
    with pytest.raises(InputError, match="contradict"):
        small_vae(n_annotators=2)
    with pytest.raises(InputError, match="n_annotators"):
        small_vae(n_annotators=0)
    with pytest.raises(InputError, match="dirichlet"):
        small_vae(label_noise="dirichlett")


def test_safe_log():
    p = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    log_p = safe_log(p)
    log_p.sum().backward()
    assert log_p.tolist() == pytest.approx([LOG_IMPOSSIBLE, np.log(0.25), 0])
    assert p.grad.tolist() == [0, 4, 1]

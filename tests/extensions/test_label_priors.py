"""Label frequencies: gradients and posteriors that are known where all labels are."""

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from torch.nn.functional import one_hot

from pyro_scanvi import SCANVAE, InputError, SemiSupervisedELBO
from pyro_scanvi.extensions import DirichletFrequencies, FrequenciesOfBatch, LearnedFrequencies
from pyro_scanvi.extensions.label_priors import PACE
from pyro_scanvi.surgery.growing import grow
from tests.examples import SIZES, random_cells

PI = [0.5, 0.3, 0.2]


def make(kind, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**(SIZES | {"y_prior": PI} | arguments)).eval()


def parts(vae, cells):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SemiSupervisedELBO(vae.q_y).parts(vae.model, vae.guide, cells)


def shares(cells, vae):
    """What each cell says of its label, at the draws of `parts`: (N, L)."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        z = vae.q_z(cells).rsample()
        q = vae.q_y(z, cells).probs
    known = one_hot(cells.label.clamp(min=0), 3).float()
    return torch.where(cells.labelled[:, None], known, q)


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
@pytest.mark.parametrize("teach", [True, False])
def test_frequencies_follow_labels_and_classifier(labels, teach):
    """The gradient is that of -sum r log pi: the cells that teach, times pi, minus their shares."""
    vae = make(LearnedFrequencies, labelled_teach=teach)
    cells = random_cells(vae, labels)
    parts(vae, cells).loss.backward()
    r = shares(cells, vae)
    r = r if teach else r[~cells.labelled]
    expected = PACE * (len(r) * torch.tensor(PI) - r.sum(0)) / len(cells)
    torch.testing.assert_close(vae.pi_logits.grad, expected, rtol=1e-4, atol=1e-5)


def test_new_frequencies_are_those_given():
    plain = make(SCANVAE)
    cells = random_cells(plain)
    for kind in (LearnedFrequencies, DirichletFrequencies, FrequenciesOfBatch):
        torch.testing.assert_close(make(kind).frequencies.reshape(-1), torch.tensor(PI))
    learned = make(LearnedFrequencies)
    torch.testing.assert_close(parts(learned, cells).loss, parts(plain, cells).loss)


def test_the_posterior_of_pi_is_that_of_conjugate_counts():
    """There p(y | pi) p(pi) / q(pi) is the Dirichlet-multinomial p(y), whatever pi is drawn."""
    vae = make(DirichletFrequencies, concentration=2.0)
    cells = random_cells(vae, "all")
    n = np.bincount(cells.label, minlength=3)
    prior = 2.0 * 3 * np.array(PI)
    posterior = torch.tensor(prior + n)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        vae.pi_log_total.copy_(posterior.sum().log() / PACE)
        vae.pi_logits.copy_(posterior.log() / PACE)
        p, q = vae.p_shared()["pi"], vae.q_shared()["pi"]
        pi = q.sample((5,))
        log_ratio = p.log_prob(pi) + pi.log() @ torch.tensor(n).float() - q.log_prob(pi)
    expected = gammaln(prior.sum()) - gammaln(prior.sum() + n.sum())
    expected += (gammaln(prior + n) - gammaln(prior)).sum()
    np.testing.assert_allclose(log_ratio, np.full(5, expected), rtol=1e-4)
    torch.testing.assert_close(q.mean.double(), posterior / posterior.sum())


@pytest.mark.parametrize("kind", [DirichletFrequencies, FrequenciesOfBatch])
@pytest.mark.parametrize("teach", [True, False])
def test_labelled_cells_teach_where_they_may(kind, teach):
    vae = make(kind, labelled_teach=teach)
    known, unknown = (random_cells(vae, labels) for labels in ("all", "none"))
    for cells, moves in ((known, teach), (unknown, True)):
        cells.shared = {name: q.rsample() for name, q in vae.q_shared().items()}
        vae.zero_grad()
        (vae.p_y(cells).logits.expand(12, 3)[:, 0].sum() + 0 * vae.pi_logits.sum()).backward()
        assert (vae.pi_logits.grad != 0).any() == moves


def test_frequencies_of_a_batch_are_shifted_and_pulled():
    vae = make(FrequenciesOfBatch, n_batch=2, spread=0.5)
    shift = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    with torch.no_grad():
        vae.shift_mean.copy_(shift / PACE)
    cells = random_cells(vae)
    cells.shared = {"batch_shift": shift}
    expected = (torch.tensor(PI) * shift.exp())[cells.batch]
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(vae.p_y(cells).probs, expected)
    torch.testing.assert_close(vae.frequencies[cells.batch], expected)
    cells.shared = {"batch_shift": shift.expand(4, 1, 2, 3)}  # as draws come
    torch.testing.assert_close(vae.p_y(cells).probs, expected.expand(4, -1, -1))
    kl = parts(vae, cells).kl_shared["batch_shift"].item()
    scale = vae.shift_log_scale.detach().exp().numpy()
    by_hand = np.log(0.5 / scale) + (scale**2 + shift.numpy() ** 2) / (2 * 0.5**2) - 0.5
    assert kl == pytest.approx(by_hand.sum(), rel=1e-4)


def test_new_labels_and_batches():
    """A new label has 1 / L', the others keep their ratios; a new batch is the mean of the old."""
    old = make(FrequenciesOfBatch, n_batch=2)
    with torch.no_grad():
        old.shift_mean.copy_(torch.arange(6.0).reshape(2, 3) / PACE)
    new = grow(old, make(FrequenciesOfBatch, n_batch=3, n_labels=4, y_prior=None))
    pi = (PACE * new.pi_logits).softmax(-1)
    torch.testing.assert_close(pi, torch.tensor([*(0.75 * p for p in PI), 0.25]))
    expected = torch.tensor([[0.0, 1, 2, 1], [3, 4, 5, 4], [1.5, 2.5, 3.5, 2.5]])
    torch.testing.assert_close(PACE * new.shift_mean, expected)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LearnedFrequencies, {"labelled_teach": 1}),
        (DirichletFrequencies, {"concentration": 0}),
        (FrequenciesOfBatch, {"spread": -1.0}),
    ],
)
def test_what_makes_no_sense_is_refused(kind, arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=f"{name}="):
        make(kind, **arguments)

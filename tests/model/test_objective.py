"""The objective against sums written out by hand, in float64."""

from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta, Gamma
from pyro.infer import SVI, TraceEnum_ELBO

from pyro_scanvi import SCANVAE, SemiSupervisedELBO
from tests.examples import SIZES, random_cells, small_vae

PRIOR = [0.5, 0.3, 0.2]
MODELS = {
    "default": {},
    "rich": {
        "n_batch": 2,
        "encode_covariates": True,
        "dispersion": "gene-label",
        "y_prior": PRIOR,
        "use_observed_lib_size": False,
        "library_log_means": [3.0, 3.5],
        "library_log_vars": [0.2, 0.4],
    },
}


def double_vae(seed: int = 0, **changes) -> SCANVAE:
    """A float64 model in eval mode whose batch norms have something to say."""
    vae = small_vae(seed, **changes).double().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in vae.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=rng, dtype=buffer.dtype))
    return vae


@pytest.fixture
def no_noise(monkeypatch):
    """Normals give their means, so that sums over minibatches can be compared."""

    def zeros(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", zeros)


def seeded_parts(elbo, vae, cells, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return elbo.parts(vae.model, vae.guide, cells)


# ---- by hand ----------------------------------------------------------------------------------


def log_normal(x, loc, scale):
    return (-0.5 * (((x - loc) / scale) ** 2 + (2 * torch.pi * scale**2).log())).sum(-1)


def kl_normal(loc, scale, loc0, scale0):
    return (
        scale0.log() - scale.log() + (scale**2 + (loc - loc0) ** 2) / (2 * scale0**2) - 0.5
    ).sum(-1)


def log_zinb(x, mu, theta, logits):
    """The textbook form; exact enough in float64."""
    log_nb = (
        torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
        + theta * (theta / (theta + mu)).log()
        + x * (mu / (theta + mu)).log()
    )
    gate = logits.sigmoid()
    return (gate * (x == 0) + (1 - gate) * log_nb.exp()).log().sum(-1)


def one(codes, n):
    return torch.eye(n, dtype=torch.float64)[codes]


def noise(vae, n, seed=1, n_values=3):
    """What the guide draws for z, u of each value of the label, and l."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shapes = (n, vae.n_latent), (n_values, n, vae.n_latent), (n, 1)
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loss_by_hand(vae, cells, feed_labels, kl_weight, ratio, seed=1):
    """The formula of the module's docstring, label by label, from the same noise.

    The guide draws u once for every label; where the label is known, only that of it counts. Of
    cells that are all labelled it draws one.
    """
    batch = one(cells.batch, 2) if vae.n_batch == 2 else None
    known = cells.labelled if feed_labels else torch.zeros_like(cells.labelled)
    loc, scale = vae.z_encoder((1 + cells.x).log(), batch)
    z_noise, u_noise, l_noise = noise(vae, len(cells), seed, 1 if known.all() else 3)
    z = loc + scale * z_noise
    library, kl_l = cells.x.sum(-1, keepdim=True), 0.0
    if vae.latent_library:
        l_loc, l_scale = vae.l_encoder((1 + cells.x).log(), batch)
        m, v = vae.library_log_means[cells.batch], vae.library_log_vars[cells.batch]
        kl_l = kl_normal(l_loc, l_scale, m[:, None], v[:, None].sqrt())
        library = (l_loc + l_scale * l_noise).exp()
    hidden = vae.x_decoder(z, batch)
    mu, gate = library * vae.x_decoder.expression(hidden), vae.x_decoder.gate(hidden)
    scores = vae.classifier(z)
    q_y = scores.exp() / scores.exp().sum(-1, keepdim=True)
    total = 0.0
    for y in range(3):
        label = torch.full_like(cells.label, y)
        u_loc, u_scale = vae.u_encoder(z, one(label, 3))
        u = u_loc + u_scale * u_noise[y % len(u_noise)]
        theta = vae.dispersion.log_theta.exp()
        theta = theta[y] if theta.ndim == 2 else theta
        kl_u = kl_normal(u_loc, u_scale, torch.zeros_like(u), torch.ones_like(u))
        log_q_y = torch.where(known, 0.0, q_y[:, y].log())
        kl_y = log_q_y - vae.y_prior[y].log()
        cost = -log_zinb(cells.x, mu, theta, gate)
        cost = cost + log_normal(z, loc, scale) - log_normal(z, *vae.z_decoder(u, one(label, 3)))
        weight = torch.where(known, (cells.label == y).double(), q_y[:, y])
        total = total + weight * (cost + kl_weight * (kl_u + kl_y + kl_l))
    loss = total.mean()
    for i in cells.labelled.nonzero().flatten():
        logits = vae.classifier(loc)[i]
        cross_entropy = logits.logsumexp(0) - logits[cells.label[i]]
        loss = loss + ratio * cross_entropy / cells.labelled.sum()
    return loss


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
@pytest.mark.parametrize("feed_labels", [True, False])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_equals_the_sum_by_hand(model, labels, feed_labels, kl_weight):
    """Value and the gradient of every parameter."""
    vae = double_vae(seed=1, **MODELS[model])  # one whose classifier has no dead layer
    cells = random_cells(vae, labels, n_obs=100)
    elbo = SemiSupervisedELBO(vae.q_y, 7.0, feed_labels, kl_weight)
    parameters = dict(vae.named_parameters())
    found = seeded_parts(elbo, vae, cells).loss
    expected = loss_by_hand(vae, cells, feed_labels, kl_weight, 7.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    gradients = torch.autograd.grad(found, parameters.values())
    expected_gradients = torch.autograd.grad(expected, parameters.values())
    pairs = zip(parameters, gradients, expected_gradients, strict=True)
    for name, gradient, expected_gradient in pairs:
        error = (gradient - expected_gradient).abs().max()
        assert expected_gradient.abs().max() > 0, name
        assert error <= 1e-8 * expected_gradient.abs().max(), name


# ---- against Pyro -----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
def test_without_extras_it_is_pyros_elbo(labels, float64):
    """The same samples, KLs by Monte Carlo, no classification: TraceEnum_ELBO over n_obs."""
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae, labels, n_obs=100)
    plain = SemiSupervisedELBO(vae.q_y, classification_ratio=0, closed_form=())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pyros = TraceEnum_ELBO(max_plate_nesting=1)
        expected = pyros.differentiable_loss(vae.model, vae.guide, cells) / 100
    found = seeded_parts(plain, vae, cells).loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_closed_form_agrees_with_monte_carlo_in_expectation():
    """z-test on paired samples; a false alarm comes once in 1.7 million seeds (5 sigma)."""
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae)
    closed = SemiSupervisedELBO(vae.q_y)
    sampled = SemiSupervisedELBO(vae.q_y, closed_form=())
    with torch.no_grad():
        difference = torch.stack(
            [
                seeded_parts(closed, vae, cells, seed).loss
                - seeded_parts(sampled, vae, cells, seed).loss
                for seed in range(100)
            ]
        )
    assert difference.std() > 1e-3  # the two do differ
    assert difference.mean().abs() < 5 * difference.std() / 100**0.5


def test_closed_form_has_the_smaller_noise():
    vae = double_vae()
    cells = random_cells(vae)
    closed, sampled = (SemiSupervisedELBO(vae.q_y, closed_form=c) for c in (("u", "l"), ()))
    with torch.no_grad():
        kls = [
            torch.stack([seeded_parts(e, vae, cells, s).kl["u"] for s in range(30)]).std(0).mean()
            for e in (closed, sampled)
        ]
    assert 3 * kls[0] < kls[1]


def test_kl_without_a_closed_form_is_sampled():
    """LogNormal against Gamma: log q(l) - log p(l) at the sample, weighted like the others."""

    class GammaLibrary(SCANVAE):
        def p_l(self, cells):
            return Gamma(cells.x.new_full((len(cells), 1), 4.0), 0.1).to_event(1)

    vae = GammaLibrary(**SIZES, **MODELS["rich"]).double().eval()
    cells = random_cells(vae)
    parts = [seeded_parts(SemiSupervisedELBO(vae.q_y, 0, kl_weight=w), vae, cells) for w in (1, 0)]
    loc, scale = vae.l_encoder((1 + cells.x).log(), one(cells.batch, 2))
    at = (loc + scale * noise(vae, len(cells))[2]).exp()
    expected = (vae.q_l(cells).log_prob(at) - vae.p_l(cells).log_prob(at)).detach()
    torch.testing.assert_close(parts[0].kl["l"], expected)
    kl = parts[0].kl
    difference = (parts[0].loss - parts[1].loss).detach()
    torch.testing.assert_close(difference, (kl["u"] + kl["y"] + expected).mean())


# ---- parts, plate and global sites ------------------------------------------------------------


@pytest.mark.parametrize("feed_labels", [True, False])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_parts_sum_to_the_loss(feed_labels, kl_weight):
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae, n_obs=1000)
    parts = seeded_parts(SemiSupervisedELBO(vae.q_y, 7.0, feed_labels, kl_weight), vae, cells)
    assert set(parts.kl) == {"u", "y", "z", "l"}
    kl = parts.kl["z"] + kl_weight * (parts.kl["u"] + parts.kl["y"] + parts.kl["l"])
    classification = parts.classification.sum() / cells.labelled.sum()
    expected = (parts.reconstruction + kl).mean() + 7.0 * classification
    torch.testing.assert_close(parts.loss.detach(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(parts.elbo(), -parts.reconstruction - sum(parts.kl.values()))
    assert parts.kl_global == 0


def test_mean_over_minibatches_is_the_loss_of_the_data(no_noise):
    vae = double_vae()
    cells = random_cells(vae, n=12)
    elbo = SemiSupervisedELBO(vae.q_y, classification_ratio=0)
    whole = elbo.loss(vae.model, vae.guide, cells)
    losses = [elbo.loss(vae.model, vae.guide, take(cells, i)) for i in (range(4), range(4, 12))]
    assert (4 * losses[0] + 8 * losses[1]) / 12 == pytest.approx(whole, rel=1e-10)


def take(cells, positions):
    """A minibatch of a data set that is `cells`."""
    positions = torch.tensor(list(positions))
    rows = {k: getattr(cells, k)[positions] for k in ("x", "batch", "label", "index")}
    return replace(cells, **rows)


class GlobalDispersion(SCANVAE):
    """Inverse dispersions with a Gamma prior, sampled outside the plate of cells."""

    def model(self, cells):
        theta = pyro.sample("theta", Gamma(3.0, 2.0).expand([self.n_input]).to_event(1))
        self.dispersion.log_theta = theta.log()
        super().model(cells)

    def guide(self, cells):
        at = self.dispersion.location.exp()
        pyro.sample("theta", Delta(at).to_event(1))
        super().guide(cells)


class LocalName(torch.nn.Module):
    """Log theta that the model sets before it is read."""

    def __init__(self, sizes):
        super().__init__()
        self.location = torch.nn.Parameter(torch.zeros(sizes.n_genes))

    def forward(self, hidden, y, batch):
        return self.log_theta


def global_vae():
    return GlobalDispersion(**SIZES, dispersion=LocalName).double().eval()


def test_a_global_site_is_weighted_once_against_all_cells():
    """A Gamma(3, 2) at theta = 1 costs -(log(2^3 / 2!) - 2) nats a gene, whatever the minibatch."""
    vae = global_vae()
    elbo = SemiSupervisedELBO(vae.q_y, classification_ratio=0)
    expected = -20 * (torch.tensor(4.0).log().double() - 2)
    for n_obs in (12, 1200):
        parts = seeded_parts(elbo, vae, random_cells(vae, n_obs=n_obs))
        torch.testing.assert_close(parts.kl_global, expected)
        local = parts.reconstruction + sum(parts.kl.values())
        torch.testing.assert_close(parts.loss.detach(), local.mean() + expected / n_obs)
        torch.testing.assert_close(parts.elbo().mean(), -parts.loss.detach())


def test_minibatches_with_a_global_site(no_noise):
    vae = global_vae()
    cells = random_cells(vae, n=12)
    elbo = SemiSupervisedELBO(vae.q_y, classification_ratio=0)
    whole = elbo.loss(vae.model, vae.guide, cells)
    losses = [elbo.loss(vae.model, vae.guide, take(cells, range(i, 12, 3))) for i in range(3)]
    assert sum(losses) / 3 == pytest.approx(whole, rel=1e-10)


def test_a_plate_of_genes_is_global_too(float64):
    """A site in a plate other than that of the cells belongs to no cell."""

    class InPlate(GlobalDispersion):
        def model(self, cells):
            with pyro.plate("genes", self.n_input, dim=-1):
                theta = pyro.sample("theta", Gamma(3.0, 2.0))
            self.dispersion.log_theta = theta.log()
            SCANVAE.model(self, cells)

        def guide(self, cells):
            with pyro.plate("genes", self.n_input, dim=-1):
                pyro.sample("theta", Delta(self.dispersion.location.exp()))
            SCANVAE.guide(self, cells)

    vae = InPlate(**SIZES, dispersion=LocalName).double().eval()
    parts = seeded_parts(SemiSupervisedELBO(vae.q_y, 0), vae, random_cells(vae, n_obs=100))
    torch.testing.assert_close(parts.kl_global, -20 * (torch.tensor(4.0).log().double() - 2))
    local = parts.reconstruction + sum(parts.kl.values())
    torch.testing.assert_close(parts.loss.detach(), local.mean() + parts.kl_global / 100)


# ---- labels -----------------------------------------------------------------------------------


def losses(vae, cells, **settings):
    return seeded_parts(SemiSupervisedELBO(vae.q_y, **settings), vae, cells).loss.detach()


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
def test_classification_is_the_mean_over_labelled_cells(labels):
    vae = double_vae()
    cells = random_cells(vae, labels)
    logits = vae.classifier(vae.z_encoder(cells.x.log1p())[0])
    known = [i for i, label in enumerate(cells.label.tolist()) if label >= 0]
    wrong = [-logits[i].softmax(-1)[cells.label[i]].log() for i in known]
    expected = sum(wrong) / len(wrong) if wrong else torch.zeros(()).double()
    without = losses(vae, cells, classification_ratio=0)
    for ratio in (1, 50):
        found = losses(vae, cells, classification_ratio=ratio) - without
        torch.testing.assert_close(found, ratio * expected.detach())


def test_elbo_reads_labels_only_if_fed():
    vae = double_vae()
    cells = random_cells(vae, "all")
    permuted = replace(cells, label=(cells.label + 1) % 3)
    settings = {"classification_ratio": 0}
    fed = [losses(vae, c, feed_labels=True, **settings) for c in (cells, permuted)]
    assert (fed[0] - fed[1]).abs() > 1e-3
    hidden = [losses(vae, c, feed_labels=False, **settings) for c in (cells, permuted)]
    assert torch.equal(*hidden)
    assert not torch.equal(fed[0], hidden[0])


def test_unlabelled_cells_do_not_see_the_setting():
    vae = double_vae()
    cells = random_cells(vae, "none")
    assert torch.equal(*(losses(vae, cells, feed_labels=f) for f in (True, False)))


def test_labelled_cells_gain_no_entropy_term(no_noise):
    """Their KL of y is -log p(y), and their ELBO does not see the classifier."""
    vae = double_vae(y_prior=PRIOR)
    cells = random_cells(vae, "mixed")
    elbo = SemiSupervisedELBO(vae.q_y, classification_ratio=0)
    before = seeded_parts(elbo, vae, cells)
    known = cells.labelled
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    torch.testing.assert_close(before.kl["y"][known], -prior[cells.label[known]].log())
    with torch.no_grad():
        vae.classifier.logits.bias += torch.tensor([1.0, 0, -1])
    after = seeded_parts(elbo, vae, cells)
    torch.testing.assert_close(after.elbo()[known], before.elbo()[known], rtol=1e-10, atol=0)
    assert ((after.elbo() - before.elbo())[~known].abs() > 1e-4).all()


def test_kl_weight_can_change_between_steps():
    vae = double_vae()
    cells = random_cells(vae)
    elbo = SemiSupervisedELBO(vae.q_y, kl_weight=0.5)
    half = seeded_parts(elbo, vae, cells)
    elbo.kl_weight = 1.0
    whole = seeded_parts(elbo, vae, cells)
    expected = 0.5 * (half.kl["u"] + half.kl["y"]).mean()
    torch.testing.assert_close((whole.loss - half.loss).detach(), expected)


# ---- as a Pyro loss ---------------------------------------------------------------------------


def test_forms_of_a_pyro_loss_agree():
    vae = double_vae()
    cells = random_cells(vae)
    elbo = SemiSupervisedELBO(vae.q_y)
    expected = losses(vae, cells)
    forms = (
        lambda: elbo.loss(vae.model, vae.guide, cells),
        lambda: elbo.loss_and_grads(vae.model, vae.guide, cells),
        lambda: elbo.differentiable_loss(vae.model, vae.guide, cells).item(),
        lambda: elbo(vae.model, vae.guide)(cells).item(),
    )
    for form in forms:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            assert form() == expected.item()


def test_svi_trains_with_it():
    vae = small_vae()
    cells = random_cells(vae, n=30)
    adam = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(vae.model, vae.guide, adam, SemiSupervisedELBO(vae.q_y))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        steps = [svi.step(cells) for _ in range(30)]
    assert sum(steps[-5:]) < 0.8 * sum(steps[:5])


def test_it_leaves_no_trace():
    """Handlers around it see what they would around model and guide; no global is touched."""
    vae = double_vae()
    cells = random_cells(vae)
    losses(vae, cells)
    assert not list(pyro.get_param_store())
    assert set(poutine.trace(vae.guide).get_trace(cells).stochastic_nodes) >= {"z", "u"}


def test_masked_cells_count_for_nothing():
    """Under `poutine.mask` of a modeller's own: the same draws, six cells of twelve."""
    vae = double_vae()
    cells = random_cells(vae, n_obs=12)
    elbo = SemiSupervisedELBO(None)
    seen = torch.arange(12) < 6
    whole = seeded_parts(elbo, vae, cells)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, guide = (poutine.mask(f, mask=seen) for f in (vae.model, vae.guide))
        found = elbo.parts(model, guide, cells)
    for now, before in (
        (found.reconstruction, whole.reconstruction),
        (found.kl["u"], whole.kl["u"]),
    ):
        torch.testing.assert_close(now, before * seen)
    torch.testing.assert_close(found.loss, -whole.elbo()[seen].sum() / 12)

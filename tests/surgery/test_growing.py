"""A grown model: old cells get the old figures, new categories start as average old ones."""

import copy
from dataclasses import replace

import pytest
import torch
from pyro.distributions import OneHotCategorical
from torch import nn

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.model.growth import ByBatch, ByLabel, EachOf, from_the_data, grows, told
from pyro_scanvi.surgery.growing import placements
from tests.estimator.test_extension import LearnedMixture
from tests.examples import SIZES, enlarged, random_cells, small_vae

LIBRARY = {"use_observed_lib_size": False}
EMBEDDING = {"batch_representation": "embedding", "batch_embedding_kwargs": {"embedding_dim": 3}}
CONFIGURATIONS = {
    "plain": {},
    "encoder": {"encode_covariates": True},
    "shallow": {"deeply_inject_covariates": False, "n_layers": 2, "encode_covariates": True},
    "deep": {"n_layers": 2, "encode_covariates": True},
    "no layers": {"n_layers": 0, "encode_covariates": True, "dispersion": "gene-cell"},
    "embedding": EMBEDDING | {"encode_covariates": True},
    "library": LIBRARY | {"encode_covariates": True},
    "gene-batch": {"dispersion": "gene-batch", "gene_likelihood": "nb"},
    "gene-label": {"dispersion": "gene-label"},
    "gene-cell": {"dispersion": "gene-cell"},
    "linear": {"linear_classifier": True, "use_layer_norm": "both", "use_batch_norm": "none"},
    "size": {"use_size_factor_key": True, "n_continuous_cov": 2, "gene_likelihood": "poisson"},
    "ln": {"latent_distribution": "ln", "y_prior": [0.5, 0.3, 0.2]},
}
GROWTHS = {  # batches, categories of two covariates, labels
    "batch": ((2, [3, 2], 3), (3, [3, 2], 3)),
    "first batch": ((1, [3, 1], 3), (2, [3, 1], 3)),
    "category": ((2, [3, 1], 3), (2, [4, 2], 3)),
    "label": ((2, [3, 2], 3), (2, [3, 2], 5)),
    "everything": ((1, [1, 2], 3), (4, [3, 3], 4)),
    "nothing": ((2, [3, 2], 3), (2, [3, 2], 3)),
}


def sizes_of(n_batch, categories, n_labels, **arguments):
    """Arguments of a model of these sizes."""
    sizes = {"n_batch": n_batch, "n_cats_per_cov": categories, "n_labels": n_labels}
    if "use_observed_lib_size" in arguments:
        prior = torch.arange(1.0, n_batch + 1)
        sizes |= {"library_log_means": prior, "library_log_vars": prior / 10}
    if n_labels > 3 and "y_prior" in arguments:
        arguments = arguments | {"y_prior": None}
    return SIZES | arguments | sizes


def reference_of(sizes, arguments):
    """A model in double precision whose every number, statistics included, is random."""
    vae = small_vae(**sizes_of(*sizes, **arguments)).double().eval()
    rng = torch.Generator().manual_seed(1)
    for name, tensor in vae.state_dict().items():
        if tensor.is_floating_point() and name not in ("y_prior",):
            tensor.copy_(0.2 + torch.rand(tensor.shape, generator=rng, dtype=tensor.dtype))
    return vae


def grown(sizes, new_sizes, arguments):
    old = reference_of(sizes, arguments)
    return old, enlarged(old, sizes_of(*new_sizes, **arguments))


def answers(vae, cells, n_labels=3):
    """Parameters of every factor at fixed latents, for the first `n_labels` labels."""
    rng = torch.Generator().manual_seed(2)
    z = torch.randn(len(cells), vae.n_latent, generator=rng, dtype=torch.double)
    y = torch.eye(vae.n_labels, dtype=torch.double)[torch.arange(len(cells)) % n_labels]
    size = cells.x.sum(1, keepdim=True)
    with torch.no_grad():
        counts = vae.count_parameters(z, size, y, cells)
        found = {"mu": counts.mu, "logits": vae.classifier(vae.state(z))[:, :n_labels]}
        if hasattr(vae, "dispersion"):
            found["theta"] = counts.theta.expand_as(counts.mu)
        if hasattr(vae.x_decoder, "gate"):
            found["gate"] = counts.gate_logits
        normals = {"q_z": vae.q_z(cells), "q_u": vae.q_u(z, y, cells), "p_z": vae.p_z(z, y, cells)}
        for name, normal in normals.items():
            found |= {f"{name} mean": normal.mean, f"{name} variance": normal.variance}
        if vae.latent_library:
            for name, q in (("q_l", vae.q_l(cells)), ("p_l", vae.p_l(cells))):
                found |= {f"{name} loc": q.base_dist.loc, f"{name} scale": q.base_dist.scale}
    return found


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_old_cells_get_the_old_figures(configuration, growth):
    """To the rounding of double precision; the same weights, not retrained ones.

    Variances are exponentials of some tens, which multiply the rounding of sums.
    """
    arguments = CONFIGURATIONS[configuration]
    old, new = grown(*GROWTHS[growth], arguments)
    cells = random_cells(old)
    before, after = answers(old, cells), answers(new, cells)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_without_new_categories_nothing_differs(configuration):
    """Not one bit of the state, nor of the answers."""
    old, new = grown(*GROWTHS["nothing"], CONFIGURATIONS[configuration])
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name
    cells = random_cells(old)
    for name, value in answers(old, cells).items():
        assert torch.equal(value, answers(new, cells)[name]), name


def test_the_reference_is_not_touched():
    old = reference_of(GROWTHS["everything"][0], {})
    before = copy.deepcopy(old.state_dict())
    new = enlarged(old, sizes_of(*GROWTHS["everything"][1]))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("encode", [False, True])
def test_a_new_batch_is_an_average_one(encode):
    """The first layer is linear: the new batch's units are the mean of the old batches'."""
    old, new = grown((2, [3], 3), (3, [3], 3), {"encode_covariates": encode})
    cells = random_cells(old)
    network = new.z_encoder if encode else new.x_decoder
    x = cells.x.log1p() if encode else torch.ones(12, 4, dtype=torch.double)

    def units(batch):
        one_hots = new.covariates.one_hot(torch.full((12,), batch), cells.categorical)
        return network.hidden.layers[0].linear(torch.cat([x, one_hots.double()], -1))

    torch.testing.assert_close(units(2), (units(0) + units(1)) / 2)
    assert not torch.allclose(units(0), units(1))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"dispersion": "gene-batch"}, "dispersion.log_theta"),
        (EMBEDDING, "covariates.embedding.weight"),
    ],
)
def test_new_rows_are_average_ones(arguments, name):
    old, new = grown((2, [3], 3), (4, [3], 3), arguments)
    rows = new.state_dict()[name]
    mean = old.state_dict()[name].mean(0)
    torch.testing.assert_close(rows[2:], torch.stack([mean, mean]))


def test_a_second_batch_starts_like_the_only_one():
    """One batch has no column; both columns start as zeros."""
    old, new = grown((1, [3], 3), (2, [3], 3), {"encode_covariates": True})
    cells = random_cells(old)
    expected, found = answers(old, cells), answers(new, replace(cells, batch=cells.batch + 1))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_an_untaught_label_has_the_mean_logit():
    """So it never wins, and the order of the others stays."""
    old, new = grown((2, [3], 3), (2, [3], 5), {})
    z = torch.randn(50, 4, dtype=torch.double)
    logits = new.classifier(z)
    torch.testing.assert_close(logits[:, :3], old.classifier(z))
    torch.testing.assert_close(logits[:, 3], logits[:, :3].mean(1))
    assert (logits.argmax(1) == old.classifier(z).argmax(1)).all()


def test_label_prior():
    """[.5, .3, .2] with one more label: that has 1/4, the others three quarters of theirs."""
    _, new = grown((2, [3], 3), (2, [3], 4), {"y_prior": [0.5, 0.3, 0.2]})
    expected = torch.tensor([0.375, 0.225, 0.15, 0.25], dtype=torch.double)
    torch.testing.assert_close(new.y_prior, expected, rtol=1e-6, atol=0)


def test_library_prior():
    """Old batches keep theirs, new ones have that of the arguments."""
    old, new = grown((2, [3], 3), (4, [3], 3), LIBRARY)
    assert torch.equal(new.library_log_means[:2], old.library_log_means)
    assert new.library_log_means[2:].tolist() == [3, 4]
    assert torch.equal(new.library_log_vars[:2], old.library_log_vars)


def test_precision_is_kept():
    assert grown(*GROWTHS["batch"], {})[1].y_prior.dtype == torch.double


# ---- parameters of one's own --------------------------------------------------------------------


class BatchShift(SCANVAE):
    """A parameter that depends on the number of batches, of which no rule knows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(torch.zeros(self.n_batch))


def test_parameters_of_the_same_shape_are_copied():
    old = LearnedMixture(**sizes_of(2, [3], 3))
    new = enlarged(old, sizes_of(3, [3], 3))
    assert type(new) is LearnedMixture
    assert torch.equal(new.centres, old.centres) and torch.equal(new.weights, old.weights)


def test_parameters_without_a_rule_are_refused():
    old = BatchShift(**sizes_of(2, [3], 3))
    with pytest.raises(InputError, match=r"shift has shape \(2,\).*\(3,\).*no rule"):
        enlarged(old, sizes_of(3, [3], 3))
    assert enlarged(old, sizes_of(2, [4], 3)).shift.shape == (2,)


class PerBatch(nn.Module):
    """A dispersion for each batch, which does not say how it grows."""

    reads_label = False

    def __init__(self, sizes):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, sizes.n_batch + 1)[:, None])

    def forward(self, hidden, y, batch):
        return self.scale[batch]


class GrowingPerBatch(PerBatch):
    """The same, which says it."""

    def growth(self):
        return {"scale": ByBatch(dim=0)}


class LearnedPi(SCANVAE):
    """Label frequencies are learned, with an argument for their start."""

    def __init__(self, *args, rarer=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_pi = nn.Parameter(-rarer * torch.arange(float(self.n_labels)))
        grows(self, log_pi=ByLabel(dim=0))

    def p_y(self, cells):
        return OneHotCategorical(logits=self.log_pi)


def test_a_learned_label_prior_grows():
    """log pi is 0, -2, -4; each new label has the mean, and old ratios stay."""
    old = LearnedPi(**sizes_of(2, [3], 3), rarer=2.0)
    new = enlarged(old, sizes_of(2, [3], 5))
    assert new.log_pi.tolist() == [0, -2, -4, -2, -2]
    priors = [vae.p_y(random_cells(vae)).probs for vae in (old, new)]
    ratios = [prior[:3] / prior[0] for prior in priors]
    torch.testing.assert_close(ratios[1], ratios[0])
    assert placements(old, new)["log_pi"][0].new == {3: [0, 1, 2], 4: [0, 1, 2]}


class ByMethod(BatchShift):
    """The whole table is overridden."""

    def growth(self):
        return super().growth() | {"shift": ByBatch(dim=0)}


class ByNote(BatchShift):
    """The rule stands beside the parameter; that of a part inside too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        grows(self, shift=ByBatch(dim=0))
        self.inner = nn.Linear(2, self.n_labels)
        grows(self.inner, weight=ByLabel(dim=0), bias=ByLabel(dim=0))


def test_a_rule_beside_the_parameter_is_as_good_as_one_in_the_table():
    """In copies too; for other tensors the rules are those of the model as it comes."""
    rules = [kind(**sizes_of(2, [3], 3)).growth() for kind in (ByMethod, ByNote, SCANVAE)]
    own = {"shift": ByBatch(dim=0), "inner.weight": ByLabel(dim=0), "inner.bias": ByLabel(dim=0)}
    assert rules[1] == rules[0] | own == rules[2] | own
    vae = ByNote(**sizes_of(2, [3], 3))
    assert copy.deepcopy(vae).growth() == vae.growth()
    assert told(vae) == own
    old = ByNote(**sizes_of(2, [3], 3))
    old.shift.data[:] = torch.tensor([1.0, 3.0])
    new = enlarged(old, sizes_of(3, [3], 4))
    assert new.shift.tolist() == [1, 3, 2]
    torch.testing.assert_close(new.inner.weight[3], old.inner.weight.mean(0))


class BatchPi(SCANVAE):
    """Label frequencies of each batch: a matrix whose two axes grow."""

    def __init__(self, *args, rule=None, **kwargs):
        super().__init__(*args, **kwargs)
        shape = self.n_batch, self.n_labels
        self.log_pi = nn.Parameter(torch.arange(float(self.n_batch * self.n_labels)).reshape(shape))
        grows(self, log_pi=rule or EachOf(ByBatch(dim=0), ByLabel(dim=1)))

    def p_y(self, cells):
        return OneHotCategorical(logits=self.log_pi[cells.batch])


@pytest.mark.parametrize("rule", [None, EachOf(ByLabel(dim=1), ByBatch(dim=0))])
def test_a_tensor_grows_on_two_axes(rule):
    old = BatchPi(**sizes_of(2, [], 3), rule=rule)
    new = enlarged(old, sizes_of(3, [], 4) | {"rule": rule})
    expected = [[0.0, 1, 2, 1], [3, 4, 5, 4], [1.5, 2.5, 3.5, 2.5]]
    assert new.log_pi.tolist() == expected
    only_labels = enlarged(old, sizes_of(2, [], 4) | {"rule": rule})
    assert only_labels.log_pi.tolist() == [row[:4] for row in expected[:2]]


@pytest.mark.parametrize("rule", [ByBatch(dim=0), EachOf(ByLabel(dim=1))])
def test_rules_that_miss_an_axis_are_refused(rule):
    old = BatchPi(**sizes_of(2, [], 3), rule=rule)
    with pytest.raises(InputError, match=r"log_pi has shape \(2, 3\).* and \(3, 4\)"):
        enlarged(old, sizes_of(3, [], 4) | {"rule": rule})


def test_a_rule_of_nothing_is_refused():
    with pytest.raises(InputError, match="Linear has no 'wieght' to grow"):
        grows(nn.Linear(2, 2), wieght=ByLabel(dim=0))


def test_a_dispersion_of_ones_own_says_how_it_grows():
    """Old batches keep theirs, and a new one starts as their mean."""
    old = SCANVAE(**sizes_of(2, [3], 3, dispersion=GrowingPerBatch))
    new = enlarged(old, sizes_of(4, [3], 3, dispersion=GrowingPerBatch))
    assert new.dispersion.scale.tolist() == [[1], [2], [1.5], [1.5]]


def test_a_rule_that_does_not_fit_the_shape_is_refused():
    """Batches are said to be columns, of which there is one; or of an axis that is not there."""
    for dim in (1, 2):

        class Wrong(PerBatch):
            def growth(self, dim=dim):
                return {"scale": ByBatch(dim)}

        old = SCANVAE(**sizes_of(2, [3], 3, dispersion=Wrong))
        with pytest.raises(InputError, match="dispersion.scale has shape .*no rule"):
            enlarged(old, sizes_of(3, [3], 3, dispersion=Wrong))


def test_a_start_of_ones_own():
    """From the old tensor, and that of the model as it was made."""

    class Fresh(PerBatch):
        def growth(self):
            return {"scale": ByBatch(dim=0, start=from_the_data)}

    old = SCANVAE(**sizes_of(2, [3], 3, dispersion=Fresh))
    old.dispersion.scale.data[:] = 7
    new = enlarged(old, sizes_of(4, [3], 3, dispersion=Fresh))
    assert new.dispersion.scale.tolist() == [[7], [7], [3], [4]]


def test_a_dispersion_of_ones_own_is_refused_only_where_it_grows():
    old = SCANVAE(**sizes_of(2, [3], 3, dispersion=PerBatch))
    with pytest.raises(InputError, match="dispersion.scale has shape"):
        enlarged(old, sizes_of(3, [3], 3, dispersion=PerBatch))
    enlarged(old, sizes_of(2, [3], 4, dispersion=PerBatch))


def test_added_modules_are_refused():
    """They are not made by the constructor."""
    old = small_vae(n_batch=2)
    old.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="do not own the same parameters: extra.bias"):
        enlarged(old, SIZES | {"n_batch": 3})

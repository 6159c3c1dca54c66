"""Every option of SCANVAE with every value of every other option, and what each of them does."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyro_scanvi import SemiSupervisedELBO
from pyro_scanvi.model.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from tests.examples import random_cells, small_vae

LATENT_LIBRARY = {
    "use_observed_lib_size": False,
    "library_log_means": [3.7, 3.7],
    "library_log_vars": [0.1, 0.2],
}
EMBEDDING = {"batch_representation": "embedding", "batch_embedding_kwargs": {"embedding_dim": 3}}
NO_BIAS = {"activation": nn.ELU, "bias": False}


def values(option, *choices):
    return [{option: choice} for choice in choices]


OPTIONS = [
    values("dispersion", "gene", "gene-batch", "gene-label", "gene-cell"),
    values("gene_likelihood", "zinb", "nb", "poisson"),
    values("y_prior", None, [0.5, 0.3, 0.2]),
    [{}, {"labels_groups": [0, 1, 0], "use_labels_groups": True}],
    values("n_continuous_cov", 0, 2),
    values("n_cats_per_cov", None, [3], [2, 1]),
    values("encode_covariates", False, True),
    values("deeply_inject_covariates", True, False),
    values("use_batch_norm", "encoder", "decoder", "both", "none"),
    values("use_layer_norm", "encoder", "decoder", "both", "none"),
    values("classifier_parameters", None, {"n_hidden": 0}, {"n_hidden": 6, "n_layers": 2}),
    values("linear_classifier", False, True),
    values("latent_distribution", "normal", "ln"),
    [{}, LATENT_LIBRARY, {"use_size_factor_key": True}],
    [{}, EMBEDDING, {"batch_representation": "embedding"}],
    values("var_activation", None, nn.Softplus()),
    values("n_layers", 1, 2, 0),
    values("log_variational", True, False),
    values("dropout_rate", 0.0, 0.2),
    values("extra_encoder_kwargs", None, NO_BIAS),
    values("extra_decoder_kwargs", None, NO_BIAS),
]


def all_pairs(sizes):
    """Every pair ((option, value), (option, value)) of two different options."""
    cases = [[(i, value) for value in range(n)] for i, n in enumerate(sizes)]
    return {p for a, b in itertools.combinations(cases, 2) for p in itertools.product(a, b)}


def pairs_of(row):
    return set(itertools.combinations(enumerate(row), 2))


def pairwise(sizes):
    """Rows, one value an option, that hold every pair: greedily, most new pairs first."""
    missing = all_pairs(sizes)
    rows = []
    while missing:
        chosen = dict(min(missing))
        for i in set(range(len(sizes))) - set(chosen):
            new = [
                sum(tuple(sorted([(i, v), c])) in missing for c in chosen.items())
                for v in range(sizes[i])
            ]
            chosen[i] = max(range(sizes[i]), key=lambda v: (new[v], (v + len(rows)) % sizes[i]))
        rows.append([chosen[i] for i in range(len(sizes))])
        missing -= pairs_of(rows[-1])
    return rows


SIZES = [len(option) for option in OPTIONS]
ROWS = pairwise(SIZES)


def arguments(row):
    chosen = {}
    for option, value in zip(OPTIONS, row, strict=True):
        chosen |= option[value]
    return chosen


def test_rows_hold_every_pair():
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(SIZES)
    assert len(ROWS) < 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "".join(map(str, row)))
def test_combination(row):
    """Two steps, a finite gradient in every parameter, predictions, state dict there and back."""
    vae = small_vae(n_batch=2, **arguments(row))
    cells = random_cells(vae)
    elbo = SemiSupervisedELBO(vae.q_y)
    adam = torch.optim.Adam(vae.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2):
            adam.zero_grad()
            elbo.loss_and_grads(vae.model, vae.guide, cells)
            for name, parameter in vae.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            adam.step()
    probabilities = predictions(vae, cells)
    assert probabilities.shape == (12, 3) and probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    new = small_vae(seed=1, n_batch=2, **arguments(row))
    assert not torch.equal(predictions(new, cells), probabilities)
    new.load_state_dict(vae.state_dict())
    assert torch.equal(predictions(new, cells), probabilities)


def predictions(vae, cells):
    with torch.no_grad():
        return vae.eval().q_y(vae.q_z(cells).mean, cells).probs


# ---- each option does what it says --------------------------------------------------------------


def pair(**changes):
    """The model as it comes and the changed one, of two batches, in eval mode."""
    return small_vae(n_batch=2).eval(), small_vae(n_batch=2, **changes).eval()


def counts(vae, cells, z=None, y=None, size=None):
    """p(x | z, l, y, s, c), by default at the mean of q(z | x) and the first label."""
    z = vae.q_z(cells).mean if z is None else z
    y = torch.eye(3)[torch.zeros(len(cells), dtype=torch.long)] if y is None else y
    size = cells.x.sum(1, keepdim=True) if size is None else size
    return vae.p_x(z, size, y, cells).base_dist


def test_sizes():
    vae = small_vae(n_input=30, n_labels=5, n_hidden=7, n_latent=3, n_layers=2)
    cells = random_cells(vae)
    assert vae.q_z(cells).mean.shape == (12, 3) and vae.p_y(cells).probs.shape == (5,)
    widths = [block.linear.weight.shape for block in vae.z_encoder.hidden.layers]
    assert widths == [(7, 30), (7, 7)]
    latent_library = small_vae(n_batch=2, n_layers=2, **LATENT_LIBRARY)
    assert len(latent_library.l_encoder.hidden.layers) == 1  # as in scvi-tools
    assert counts(small_vae(), random_cells(small_vae())).mu.shape == (12, 20)


@pytest.mark.parametrize(
    "dispersion, differs",
    [("gene", ""), ("gene-batch", "batch"), ("gene-label", "label"), ("gene-cell", "cell")],
)
def test_dispersion(dispersion, differs):
    """Its inverse differs by what the name says, and by nothing else."""
    vae = small_vae(n_batch=2, dispersion=dispersion).eval()
    cells = random_cells(vae)
    z, y = torch.randn(12, 4), torch.eye(3)[torch.arange(12) % 3]
    theta = counts(vae, cells, z, y).theta
    others = {
        "batch": counts(vae, replace(cells, batch=1 - cells.batch), z, y).theta,
        "label": counts(vae, cells, z, y.roll(1, -1)).theta,
        "cell": counts(vae, cells, z + 1, y).theta,
    }
    changed = {name for name, other in others.items() if not torch.equal(theta, other)}
    assert changed == ({"cell", "batch"} if differs == "cell" else {differs} - {""})


@pytest.mark.parametrize(
    "name, kind",
    [("zinb", ZeroInflatedNegativeBinomial), ("nb", NegativeBinomial), ("poisson", Poisson)],
)
def test_gene_likelihood(name, kind):
    vae = small_vae(gene_likelihood=name)
    assert type(counts(vae, random_cells(vae))) is kind
    assert hasattr(vae, "dispersion") == (name != "poisson")
    assert hasattr(vae.x_decoder, "gate") == (name == "zinb")


def test_y_prior():
    uniform, given = small_vae(), small_vae(y_prior=[[0.5, 0.3, 0.2]])
    cells = random_cells(given)
    assert uniform.p_y(cells).probs.tolist() == pytest.approx([1 / 3] * 3)
    assert given.p_y(cells).probs.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_labels_groups():
    """Probabilities of a group's labels sum to the probability of the group."""
    vae = small_vae(labels_groups=[0, 1, 0], use_labels_groups=True).eval()
    z, cells = torch.randn(12, 4), random_cells(vae)
    found, groups = vae.q_y(z, cells).probs, vae.classifier.groups(z).softmax(-1)
    torch.testing.assert_close(torch.stack([found[:, 0] + found[:, 2], found[:, 1]], 1), groups)


COVARIATES = {
    "batch": ({}, lambda c: replace(c, batch=1 - c.batch)),
    "continuous": ({"n_continuous_cov": 2}, lambda c: replace(c, continuous=c.continuous + 1)),
    "categorical": ({"n_cats_per_cov": [3]}, lambda c: replace(c, categorical=2 - c.categorical)),
    "embedding": (EMBEDDING, lambda c: replace(c, batch=1 - c.batch)),
}


@pytest.mark.parametrize("covariate", COVARIATES)
@pytest.mark.parametrize("encode", [False, True])
def test_covariates_reach_the_decoder_and_if_asked_the_encoder(covariate, encode):
    extra, change = COVARIATES[covariate]
    vae = small_vae(n_batch=2, encode_covariates=encode, **extra).eval()
    cells = random_cells(vae)
    other = change(cells)
    z = torch.randn(12, 4)
    assert not torch.allclose(counts(vae, cells, z).mu, counts(vae, other, z).mu)
    assert torch.equal(vae.q_z(cells).mean, vae.q_z(other).mean) != encode


def test_labels_and_batches_are_read_without_hidden_layers():
    vae = small_vae(n_batch=2, n_layers=0).eval()
    cells = random_cells(vae)
    z, y = torch.randn(12, 4), torch.eye(3)[torch.arange(12) % 3]
    assert not torch.allclose(vae.q_u(z, y, cells).mean, vae.q_u(z, y.roll(1, -1), cells).mean)
    assert not torch.allclose(vae.p_z(z, y, cells).mean, vae.p_z(z, y.roll(1, -1), cells).mean)
    other = replace(cells, batch=1 - cells.batch)
    assert not torch.allclose(counts(vae, cells, z).mu, counts(vae, other, z).mu)


def test_a_covariate_of_one_category_adds_nothing():
    plain, other = (
        small_vae(n_batch=2, n_cats_per_cov=n).x_decoder.hidden.n_covariates for n in ([3], [3, 1])
    )
    assert plain == other == 5
    assert small_vae(n_batch=1).x_decoder.hidden.n_covariates == 0


@pytest.mark.parametrize("deep", [True, False])
def test_deeply_inject_covariates(deep):
    """Into the decoder of counts and the encoders of z and l; labels are always injected."""
    arguments = LATENT_LIBRARY | {"n_layers": 2, "encode_covariates": True}
    vae = small_vae(n_batch=2, deeply_inject_covariates=deep, **arguments)
    for network in (vae.x_decoder, vae.z_encoder):
        assert network.hidden.layers[1].linear.in_features == (10 if deep else 8)
    assert vae.z_decoder.hidden.layers[1].linear.in_features == 8 + 3


@pytest.mark.parametrize(
    "changes, widths, dropout",
    [
        ({}, [8], 0.1),
        ({"classifier_parameters": {"n_hidden": 6, "n_layers": 2}}, [6, 6], 0.1),
        ({"classifier_parameters": {"dropout_rate": 0.4}}, [8], 0.4),
        ({"classifier_parameters": {"n_hidden": 0}}, [], None),
        ({"linear_classifier": True}, [], None),
    ],
)
def test_classifier(changes, widths, dropout):
    hidden = small_vae(**changes).classifier.hidden.layers
    assert [block.linear.out_features for block in hidden] == widths
    assert {block.dropout.p for block in hidden} == {dropout} - {None}


def test_latent_distribution():
    """With "ln" classifier, decoder of counts and u encoder see softmax(z)."""
    plain, ln = pair(latent_distribution="ln")
    cells = random_cells(ln)
    z, y = torch.randn(12, 4), torch.eye(3)[cells.label.clamp(min=0)]
    on_simplex = z.softmax(-1)
    torch.testing.assert_close(ln.q_y(z, cells).logits, plain.q_y(on_simplex, cells).logits)
    torch.testing.assert_close(ln.q_u(z, y, cells).mean, plain.q_u(on_simplex, y, cells).mean)
    torch.testing.assert_close(counts(ln, cells, z).mu, counts(plain, cells, on_simplex).mu)
    assert not torch.allclose(ln.q_y(z, cells).logits, plain.q_y(z, cells).logits)


def test_log_variational():
    plain, raw = pair(log_variational=False)
    cells = random_cells(plain)
    logged = replace(cells, x=cells.x.log1p())
    torch.testing.assert_close(plain.q_z(cells).mean, raw.q_z(logged).mean)
    assert not torch.allclose(plain.q_z(cells).mean, raw.q_z(cells).mean)


def test_library():
    """Observed it is the total count; latent it is sampled; a size factor is taken as it is."""
    observed, latent = pair(**LATENT_LIBRARY)
    cells = random_cells(observed)
    torch.testing.assert_close(counts(observed, cells).mu.sum(1), cells.x.sum(1))
    assert latent.observed_library(cells) is None
    given = small_vae(use_size_factor_key=True).eval()
    cells = random_cells(given)
    assert given.observed_library(cells) is cells.size_factor
    double = counts(given, cells, size=2 * cells.size_factor).mu
    torch.testing.assert_close(double, 2 * counts(given, cells, size=cells.size_factor).mu)
    assert isinstance(given.x_decoder.expression[1], nn.Softplus)


def test_var_activation():
    """Variance of z and l: activation of the second head, plus 1e-4."""
    vae = small_vae(**(LATENT_LIBRARY | {"n_batch": 2}), var_activation=nn.Softplus()).eval()
    cells = random_cells(vae)
    for q, network in ((vae.q_z(cells), vae.z_encoder), (vae.q_l(cells), vae.l_encoder)):
        head = network.variance(network.hidden(cells.x.log1p()))
        expected = (1 + head.exp()).log() + 1e-4
        torch.testing.assert_close(q.base_dist.scale**2, expected)
    plain = small_vae().eval()
    head = plain.z_encoder.variance(plain.z_encoder.hidden(cells.x.log1p()))
    torch.testing.assert_close(plain.q_z(cells).variance, head.exp() + 1e-4)


def test_batch_representation():
    assert small_vae(n_batch=2).covariates.embedding is None
    embedded = small_vae(n_batch=2, **EMBEDDING)
    assert embedded.covariates.embedding.weight.shape == (2, 3)
    assert embedded.x_decoder.hidden.n_covariates == 0
    default = small_vae(n_batch=2, batch_representation="embedding")
    assert default.covariates.embedding.weight.shape == (2, 5)


@pytest.mark.parametrize(
    "option, networks",
    [
        ("extra_encoder_kwargs", {"z_encoder", "l_encoder"}),
        ("extra_decoder_kwargs", {"x_decoder"}),
    ],
)
def test_extra_layer_arguments(option, networks):
    """They reach the networks that they name, and no others."""
    vae = small_vae(**(LATENT_LIBRARY | {"n_batch": 2}), **{option: NO_BIAS})
    activations = {n.split(".")[0] for n, m in vae.named_modules() if isinstance(m, nn.ELU)}
    modules = vae.named_modules()
    linear = {n.split(".")[0]: m for n, m in modules if n.endswith("hidden.layers.0.linear")}
    assert activations == networks
    assert {name for name, layer in linear.items() if layer.bias is None} == networks

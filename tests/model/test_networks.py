"""Networks: leading dimensions, norms, covariates, groups of labels; by torch and by hand."""

import pytest
import torch
from torch import nn

from pyro_scanvi.model.networks import (
    BatchNorm,
    Classifier,
    CountDecoder,
    CovariateEncoder,
    Dropout,
    GroupedClassifier,
    HiddenLayers,
    NormalNetwork,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def double(module):
    """In float64 and eval mode, with batch norms that have something to say."""
    for name, buffer in module.double().named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return module.eval()


# ---- batch norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
def test_batch_norm_is_torchs_on_the_flattened_rows(shape):
    """Output, running statistics and, in eval mode, output again."""
    ours, torchs = BatchNorm(5), nn.BatchNorm1d(5, momentum=0.01, eps=0.001)
    x = 3 + 2 * torch.randn(*shape, 5)
    for _ in range(2):
        assert torch.equal(ours(x).reshape(-1, 5), torchs(x.reshape(-1, 5)))
    for name, buffer in torchs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)
    ours.eval(), torchs.eval()
    assert torch.equal(ours(x).reshape(-1, 5), torchs(x.reshape(-1, 5)))


def test_batch_norm_by_hand():
    x = torch.tensor([[0.0], [2.0], [4.0]])
    norm = BatchNorm(1)
    expected = (x - 2) / (torch.tensor(8 / 3) + 0.001).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert norm.running_mean.item() == pytest.approx(0.01 * 2)
    assert norm.running_var.item() == pytest.approx(0.99 + 0.01 * 4)  # unbiased


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5)])
def test_batch_norm_of_one_row(shape):
    """By the running statistics, which stay; torch's refuses."""
    norm = BatchNorm(5)
    norm(torch.randn(8, 5))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    row = torch.randn(shape, requires_grad=True)
    found = norm(row)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    torch.testing.assert_close(found, norm.eval()(row))
    found.sum().backward()
    assert (row.grad != 0).all() and norm.weight.grad is not None
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(5)(row.reshape(1, 5))


# ---- hidden layers ------------------------------------------------------------------------------


def test_order_of_a_block():
    settings = {"batch_norm": True, "layer_norm": True, "dropout_rate": 0.1}
    block = HiddenLayers(4, 8, **settings).layers[0]
    names = ["linear", "batch_norm", "layer_norm", "activation", "dropout"]
    assert [name for name, _ in block.named_children()] == names
    assert not list(block.layer_norm.parameters())


def test_a_block_by_hand():
    layers = double(HiddenLayers(4, 8, layer_norm=True))
    x = torch.randn(6, 4, dtype=torch.float64)
    block = layers.layers[0]
    norm = block.batch_norm
    hidden = x @ block.linear.weight.T + block.linear.bias
    hidden = (hidden - norm.running_mean) / (norm.running_var + 0.001).sqrt()
    centred = hidden - hidden.mean(-1, keepdim=True)
    hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layers(x), hidden.clamp(min=0))


NETWORKS = {
    "hidden layers": lambda: HiddenLayers(4, 8, 2, n_covariates=3),
    "no layers": lambda: HiddenLayers(4, 8, 0, n_covariates=3),
    "normal": lambda: NormalNetwork(HiddenLayers(4, 8, n_covariates=3), 2),
    "decoder": lambda: CountDecoder(HiddenLayers(4, 8, n_covariates=3), 20, nn.Softmax(-1)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("leading", [(2,), (3, 2)])
def test_leading_dimensions_are_a_loop(network, leading):
    """(..., N, F) is the stack of what each (N, F) gives, with the same covariates for all."""
    network = double(NETWORKS[network]())
    x = torch.randn(*leading, 6, 4, dtype=torch.float64)
    covariates = torch.randn(6, 3, dtype=torch.float64)
    found = network(x, covariates)
    found = found if isinstance(found, tuple) else (found,)
    for i, rows in enumerate(x.reshape(-1, 6, 4)):
        expected = network(rows, covariates)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == (*leading, *other.shape)
            torch.testing.assert_close(one.reshape(-1, *other.shape)[i], other)


def test_covariates_with_more_dimensions_than_the_input():
    """Enumerated labels, (L, N, L), beside a state (N, K) that has no such dimension."""
    layers = double(HiddenLayers(4, 8, n_covariates=3))
    x = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.eye(3).unsqueeze(1).expand(3, 6, 3)
    for label, found in zip(labels, layers(x, labels), strict=True):
        torch.testing.assert_close(found, layers(x, label))


@pytest.mark.parametrize("deep", [True, False])
def test_covariates_join_every_layer_or_the_first(deep):
    """Widths, and the sum by hand: covariates have the last columns of a layer's weight."""
    layers = double(HiddenLayers(4, 8, 3, n_covariates=2, deep=deep, batch_norm=False))
    widths = [block.linear.in_features for block in layers.layers]
    assert widths == ([6, 10, 10] if deep else [6, 8, 8])
    x, covariates = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    expected = x
    for i, block in enumerate(layers.layers):
        weight = block.linear.weight
        hidden = expected @ weight[:, : expected.shape[1]].T + block.linear.bias
        if deep or i == 0:
            hidden = hidden + covariates @ weight[:, -2:].T
        expected = hidden.clamp(min=0)
    torch.testing.assert_close(layers(x, covariates), expected)


def test_without_layers_the_input_and_its_covariates_pass():
    layers = HiddenLayers(4, 8, 0, n_covariates=3)
    x, covariates = torch.randn(5, 4), torch.randn(5, 3)
    assert layers.n_out == 7
    assert torch.equal(layers(x, covariates), torch.cat([x, covariates], -1))
    plain = HiddenLayers(4, 8, 0)
    assert plain.n_out == 4 and plain(x) is x


def test_dropout_acts_in_training_only():
    layers = HiddenLayers(4, 1000, dropout_rate=0.5, batch_norm=False, activation=nn.Identity)
    x = torch.randn(1, 4)
    dropped = (layers(x) == 0).float().mean().item()
    assert abs(dropped - 0.5) < 0.08  # 5 standard errors of 1,000 units
    assert (layers.eval()(x) != 0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 1 / 3])
def test_dropout_keeps_its_rate_and_the_mean(rate):
    """Each of the four units that share a random number; false alarm 1e-6 each (4.9 errors)."""
    n = 1_000_000
    dropped = Dropout(rate)(torch.ones(n))
    by_lane = (dropped == 0).double().reshape(-1, 4).mean(0)
    error = (rate * (1 - rate) / (n / 4)) ** 0.5
    assert ((by_lane - rate).abs() < 4.9 * error + 1 / 32768).all()
    kept = dropped[dropped != 0].unique()
    assert len(kept) == 1 and kept.item() == pytest.approx(1 / (1 - rate), abs=1e-4)


def test_dropout_of_neighbours_is_independent():
    """Correlations of the four units of a random number; false alarm 1e-6 each (4.9 errors)."""
    lanes = Dropout(0.3)(torch.ones(400_000)).reshape(-1, 4).T
    correlation = torch.corrcoef(lanes) - torch.eye(4)
    assert correlation.abs().max() < 4.9 / 100_000**0.5


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_dropout_is_what_was_kept(shape, dtype):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    dropped = Dropout(0.5)(x)
    dropped.sum().backward()
    assert dropped.dtype == dtype and torch.equal(x.grad, dropped.detach())


def test_dropout_of_nothing_and_of_everything():
    x = torch.randn(10)
    assert Dropout(0.0)(x) is x and Dropout(0.5).eval()(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(x.to("meta")).shape == x.shape


def test_activation_and_bias():
    layers = HiddenLayers(4, 8, 2, activation=nn.Tanh, bias=False)
    assert isinstance(layers.layers[1].activation, nn.Tanh)
    assert all(block.linear.bias is None for block in layers.layers)


# ---- heads --------------------------------------------------------------------------------------


def test_normal_network_by_hand():
    network = double(NormalNetwork(HiddenLayers(4, 8), 2, nn.functional.softplus, 0.5))
    x = torch.randn(6, 4, dtype=torch.float64)
    hidden = network.hidden(x)
    loc, scale = network(x)
    torch.testing.assert_close(loc, hidden @ network.mean.weight.T + network.mean.bias)
    head = hidden @ network.variance.weight.T + network.variance.bias
    torch.testing.assert_close(scale**2, (1 + head.exp()).log() + 0.5)


def test_count_decoder():
    decoder = CountDecoder(HiddenLayers(4, 8), 20, nn.Softmax(-1))
    hidden = decoder(torch.randn(3, 6, 4))
    torch.testing.assert_close(decoder.expression(hidden).sum(-1), torch.ones(3, 6))
    assert decoder.gate(hidden).shape == (3, 6, 20)
    assert not hasattr(CountDecoder(HiddenLayers(4, 8), 20, nn.Softmax(-1), gate=False), "gate")


def test_grouped_classifier_by_hand():
    """p(label) = p(group of label) * p(label | group), each a softmax."""
    groups = [0, 1, 0, 2, 1]
    classifiers = [Classifier(HiddenLayers(4, 8), n) for n in (5, 3)]
    network = double(GroupedClassifier(*classifiers, torch.tensor(groups)))
    z = torch.randn(2, 6, 4, dtype=torch.float64)
    scores, group_scores = network.labels(z).exp(), network.groups(z).exp()
    found = network(z)
    for label, group in enumerate(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        within = scores[..., label] / sum(scores[..., i] for i in members)
        expected = within * group_scores[..., group] / group_scores.sum(-1)
        torch.testing.assert_close(found[..., label].exp(), expected)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2, 6, dtype=torch.float64))


def test_grouped_classifier_is_finite_for_extreme_logits():
    network = GroupedClassifier(nn.Identity(), nn.Identity(), torch.tensor([0, 0, 1]))
    network.groups = nn.Linear(3, 2)
    found = network(torch.tensor([[500.0, -500.0, 0.0]]))
    assert found.isfinite().all()


# ---- covariates ---------------------------------------------------------------------------------


def test_one_hot_covariates():
    """Batch first; covariates of one category are left out."""
    encoder = CovariateEncoder(2, n_cats_per_cov=(3, 1))
    codes = torch.tensor([[2, 0], [0, 0]])
    expected = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]])
    assert encoder.n_one_hot == 5
    assert torch.equal(encoder.one_hot(torch.tensor([0, 1]), codes), expected)
    assert CovariateEncoder(1).one_hot(torch.tensor([0, 0]), None) is None


def test_dense_covariates():
    """Values, then the vector of the batch, the same for every leading dimension."""
    encoder = CovariateEncoder(2, n_continuous=1, batch_embedding_dim=3)
    x, values, batch = torch.randn(4, 2, 5), torch.randn(2, 1), torch.tensor([1, 0])
    found = encoder.dense(x, batch, values)
    assert encoder.n_dense == 4 and encoder.n_one_hot == 0
    assert torch.equal(found[..., :5], x)
    for i in range(4):
        assert torch.equal(found[i, :, 5:6], values)
        assert torch.equal(found[i, :, 6:], encoder.embedding.weight[batch])

"""Networks that turn tensors into the parameters of distributions. Pure torch: no Pyro, no AnnData.

Every network accepts inputs of shape ``(..., N, features)``: enumeration adds dimensions on the
left of the cells. Covariates have shape ``(N, n_covariates)`` and are the same for all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyro_scanvi.model import hidden_kernels, kernels, normal_kernels
from pyro_scanvi.model.growth import ByBatch, grows
from pyro_scanvi.model.hidden_kernels import STEPS

# Where others may listen to a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over all leading dimensions, with the momentum and epsilon of scVI.

    A minibatch of one row has no variance; it is normalised by the running statistics, which it
    leaves alone. Where several processes train, statistics are those of the rows of all.

    Attributes
    ----------
    gather
        From a tensor to that of each process, (n, ...), with a gradient; None where one trains.
    """

    gather: Callable[[Tensor], Tensor] | None = None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int):
        super().__init__(num_features, momentum=0.01, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape (..., num_features)."""
        rows = x.reshape(-1, x.shape[-1])
        if self.training and self.gather is not None:
            return self._of_all(rows, self.gather).reshape(x.shape)
        if self.training and len(rows) == 1:
            statistics = (self.running_mean, self.running_var, self.weight, self.bias)
            return nn.functional.batch_norm(rows, *statistics, eps=self.eps).reshape(x.shape)
        return super().forward(rows).reshape(x.shape)

    def _of_all(self, rows: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalised by mean and variance of the rows of all processes (Chan et al. 1983)."""
        own = rows.to(self.weight.dtype)
        mean, n = own.mean(0), own.new_tensor([len(own)])
        told = gather(torch.cat([n, mean, (own - mean).square().sum(0)]))
        n, means, squares = told.split([1, len(mean), len(mean)], dim=1)
        mean = (n * means).sum(0) / n.sum()
        square = (squares + n * (means - mean).square()).sum(0)
        self.follow(mean.detach(), (square / (n.sum() - 1)).detach())
        scale = self.weight * (square / n.sum() + self.eps).rsqrt()
        return ((own - mean) * scale + self.bias).to(rows.dtype)

    def follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a minibatch, (num_features,) each."""
        self.num_batches_tracked += 1
        # Without a momentum they are means of all minibatches, as where weights are averaged.
        rate = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance, rate)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms inside normalise by their running statistics, and leave them alone.

    For inputs that are no cells of the minibatch, such as the pseudo-inputs of a VampPrior
    (Tomczak and Welling 2018, AISTATS, arXiv 1705.07120). Gradients flow, and dropout stays.

    Examples
    --------
    >>> norm = BatchNorm(2).train()
    >>> with frozen_statistics(norm):
    ...     _ = norm(torch.ones(5, 2))
    >>> norm.training, norm.running_mean.tolist()
    (True, [0.0, 0.0])
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class Head(nn.Linear):
    """A linear layer to parameters of a distribution, in full precision under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, in_features) to (..., N, out_features)."""
        return super().forward(x).to(self.weight.dtype)


class JoinedLinear(nn.Linear):
    """A linear layer of an input and covariates, W_x x + W_c c + b.

    Each is multiplied in its own shape, and the sum broadcasts: of N cells and L labels that are
    enumerated, which come as (N, K) and (L, 1, L), neither N copies of the labels nor L of the
    cells are made. With 400 labels that is most of a step.
    """

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., N, n) and (..., N, n_covariates), which broadcast, to (..., N, out_features)."""
        if covariates is None:
            return super().forward(x)
        of_x, of_covariates = self.parts(x, covariates)
        return of_x + of_covariates

    def parts(self, x: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """W_x x, and W_c c + b, or b alone without covariates: their sum is the output."""
        if covariates is None:
            return nn.functional.linear(x, self.weight), self._row_of_bias(x)
        of_x, of_covariates = self.weight.tensor_split([x.shape[-1]], dim=-1)
        shift = nn.functional.linear(covariates.to(x.dtype), of_covariates, self.bias)
        return nn.functional.linear(x, of_x), shift

    def _row_of_bias(self, x: Tensor) -> Tensor:
        return x.new_zeros(1, self.out_features) if self.bias is None else self.bias.unsqueeze(0)


class Dropout(nn.Dropout):
    """Dropout that draws four units with each random number, on the CPU in a fourth of the time.

    A unit stays where 15 random bits are below a bound, so the rate is one of 32,768 steps; what
    stays is divided by the probability that it does.
    """

    @property
    def bound(self) -> int:
        """What the bits of a unit that stays are below."""
        return round((1 - self.p) * STEPS)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, each unit kept or 0; as it is in eval mode."""
        bound = self.bound
        if not self.training or bound == STEPS:
            return x
        if x.device.type != "cpu" or not bound:
            return super().forward(x)
        # An int64 is four int16, of which the sign bits are not all random.
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)
        drawn = drawn[: x.numel()].view(x.shape).bitwise_and_(STEPS - 1)
        kept = torch.lt(drawn, bound, out=torch.empty(x.shape, dtype=x.dtype))
        return x * kept.mul_(STEPS / bound)


def _are_heard(*modules: nn.Module) -> bool:
    """Whether somebody listens to a call of one of them, who would not hear of what stands in."""
    heard = any(vars(module)[hooks] for module in modules for hooks in HOOKS)
    return heard or nn.modules.module._has_any_global_hook()


class _InOnePass(Function):
    """Of x + added: batch norm by the moments of its rows, ReLU and dropout, by kernels.

    Also gives the moments.
    """

    @staticmethod
    def forward(ctx, x, added, weight, bias, shape: torch.Size, eps: float, bound: int):
        given = x, added, shape, weight, bias, eps, bound
        result, mean, variance = hidden_kernels.activated(*given)
        ctx.save_for_backward(x, added, weight, bias, result, mean, variance)
        ctx.eps, ctx.bound = eps, bound
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    def backward(ctx, slope: Tensor, *_):
        x, added, weight, bias, result, mean, variance = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if not torch.is_grad_enabled():
            given = slope, x, added, result, weight, mean, variance
            return *hidden_kernels.slopes(*given, ctx.eps, ctx.bound), None, None, None
        # A second derivative is to come, which goes through torch's operations.
        rows = (x + added).reshape(-1, x.shape[-1])
        norm = nn.functional.batch_norm(rows, None, None, weight, bias, True, eps=ctx.eps)
        again = norm.relu().view_as(result) * (result > 0) * (STEPS / ctx.bound)
        inputs = x, added, weight, bias
        return *kernels.slopes_of_plain(again, inputs, wanted, slope), None, None, None


class Block(nn.Sequential):
    """A linear layer, and what may follow: batch norm, layer norm, activation and dropout.

    With many labels, each of which is a row of each cell, what follows takes most of a step. So in
    training on the CPU, batch norm, ReLU and dropout take one pass, in a third of the time.
    """

    linear: JoinedLinear
    batch_norm: BatchNorm  # this and the next where they are asked for
    dropout: Dropout

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., N, n_in) and (..., N, n_covariates), which broadcast, to (..., N, n_hidden)."""
        linear, *others = self.children()
        if self._is_default() and kernels.serve(x, *self.parameters()):
            parts = self.linear.parts(x, covariates)
            shape = hidden_kernels.joined(*parts)
            if shape is not None and shape[:-1].numel() > 1:
                return self._by_kernels(*parts, shape)
        x = linear(x, covariates)
        for module in others:
            x = module(x)
        return x

    def _is_default(self) -> bool:
        """Whether the modules are those whose work kernels do, in training, and nobody listens."""
        modules = list(self.children())
        return (
            [type(m) for m in modules] in (DEFAULT, DEFAULT[:-1])
            and all(m.training for m in modules)
            and not _are_heard(*modules)
            and not torch.is_autocast_enabled("cpu")
            and self.batch_norm.gather is None
            and self._bound() > 0
        )

    def _bound(self) -> int:
        return self.dropout.bound if "dropout" in self._modules else STEPS

    def _by_kernels(self, x: Tensor, added: Tensor, shape: torch.Size) -> Tensor:
        norm = self.batch_norm
        how = shape, norm.eps, self._bound()
        units, mean, variance = _InOnePass.apply(x, added, norm.weight, norm.bias, *how)
        n_rows = shape[:-1].numel()
        norm.follow(mean, variance * (n_rows / (n_rows - 1)))
        return units


# What a block holds unless it is asked for something else.
DEFAULT = [JoinedLinear, BatchNorm, nn.ReLU, Dropout]


class HiddenLayers(nn.Module):
    """Blocks of Linear, BatchNorm, LayerNorm, activation and Dropout.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Width of the input, width of each hidden layer, and number of layers; without any, the
        output is the input and its covariates.
    n_covariates
        Width of the covariates that join the input of the first layer.
    deep
        Join them to the input of every layer.
    dropout_rate
        Probability of dropping a unit.
    batch_norm, layer_norm
        Normalise before the activation; both may be on.
    activation
        Makes the activation module.
    bias
        Learn a bias in the linear layers.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_covariates: int = 0,
        deep: bool = True,
        dropout_rate: float = 0.0,
        batch_norm: bool = True,
        layer_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
    ):
        super().__init__()
        self.n_out = n_hidden if n_layers else n_in + n_covariates
        self.n_covariates = n_covariates
        self.layers = nn.ModuleList()
        for i in range(n_layers):
            joined = n_covariates if i == 0 or deep else 0
            block = Block()
            block.add_module(
                "linear", JoinedLinear((n_hidden if i else n_in) + joined, n_hidden, bias=bias)
            )
            if batch_norm:
                block.add_module("batch_norm", BatchNorm(n_hidden))
            if layer_norm:
                block.add_module("layer_norm", nn.LayerNorm(n_hidden, elementwise_affine=False))
            block.add_module("activation", activation())
            if dropout_rate > 0:
                block.add_module("dropout", Dropout(dropout_rate))
            self.layers.append(block)
        self.deep = deep

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., N, n_in) and (N, n_covariates) to (..., N, n_out)."""
        assert covariates is not None or not self.n_covariates, "it was made for covariates"
        if not self.layers:
            return self._joined(x, covariates)
        for i, block in enumerate(self.layers):
            x = block(x, covariates if self.n_covariates and (i == 0 or self.deep) else None)
        return x

    def input_layers(self, *heads: nn.Module) -> list[nn.Module]:
        """The linear layers that read the input: the first, or the `heads` where there is none."""
        return [self.layers[0].get_submodule("linear")] if len(self.layers) else list(heads)

    def _joined(self, x: Tensor, covariates: Tensor | None) -> Tensor:
        if covariates is None or not self.n_covariates:
            return x
        shape = torch.broadcast_shapes(x.shape[:-1], covariates.shape[:-1])
        covariates = covariates.to(x.dtype).expand(*shape, -1)
        return torch.cat([x.expand(*shape, -1), covariates], dim=-1)


class _LocAndScale(Function):
    """m and sqrt(exp(v) + eps) from (m, v), by kernels."""

    @staticmethod
    def forward(ctx, both: Tensor, eps: float):
        loc, scale = normal_kernels.loc_and_scale(both, eps)
        ctx.eps = eps
        ctx.save_for_backward(both, scale)
        return loc, scale

    @staticmethod
    def backward(ctx, of_loc: Tensor, of_scale: Tensor):
        both, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is to come
            loc, raw = both.chunk(2, dim=-1)
            again = torch.cat([loc, (raw.exp() + ctx.eps).sqrt()], dim=-1)
            slope = torch.cat([of_loc, of_scale], dim=-1)
            return *kernels.slopes_of_plain(again, [both], [True], slope), None
        return normal_kernels.slopes_of_both(both, scale, of_loc, of_scale), None


class NormalNetwork(nn.Module):
    """Location and scale of a Normal: hidden layers and two linear heads.

    Parameters
    ----------
    hidden
        The layers before the heads.
    n_out
        Dimension of the Normal.
    var_activation
        Turns the second head into a variance.
    var_eps
        Added to the variance, so that a posterior cannot collapse to a point.
    """

    def __init__(
        self,
        hidden: HiddenLayers,
        n_out: int,
        var_activation: Callable[[Tensor], Tensor] = torch.exp,
        var_eps: float = 0.0,
    ):
        super().__init__()
        self.hidden = hidden
        self.mean = Head(hidden.n_out, n_out)
        self.variance = Head(hidden.n_out, n_out)
        self.var_activation = var_activation
        self.var_eps = var_eps

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., N, n_in) to loc and scale, each (..., N, n_out)."""
        return self.heads(self.hidden(x, covariates))

    def heads(
        self, hidden: Tensor, mean: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the hidden units (..., N, n), which further heads may read, to loc and scale.

        `mean` may stand in for that head.
        """
        heads = self.mean, self.variance
        if mean is None and {type(h) for h in heads} == {Head} and not _are_heard(*heads):
            both = self._both(hidden)
            if self.var_activation is torch.exp and normal_kernels.are_rows(both):
                return _LocAndScale.apply(both, self.var_eps)
            loc, raw = both.chunk(2, dim=-1)
        else:
            loc, raw = (mean or self.mean)(hidden), self.variance(hidden)
        return loc, (self.var_activation(raw) + self.var_eps).sqrt()

    def _both(self, hidden: Tensor) -> Tensor:
        """Outputs of the two heads, beside one another, by one product: `hidden` is read once."""
        weight = torch.cat([self.mean.weight, self.variance.weight])
        bias = torch.cat([self.mean.bias, self.variance.bias])
        return nn.functional.linear(hidden, weight, bias).to(self.mean.weight.dtype)

    def input_layers(self) -> list[nn.Module]:
        """The linear layers that read the input."""
        return self.hidden.input_layers(self.mean, self.variance)


class CountDecoder(nn.Module):
    """From a latent state to the expression, and where asked for the gate, of each gene.

    Parameters
    ----------
    hidden
        The layers before the heads.
    n_genes
        Number of genes.
    expression_activation
        Turns the first head into the expression of each gene: softmax gives proportions.
    gate
        Own a head for the logits of structural zeros.
    """

    def __init__(
        self,
        hidden: HiddenLayers,
        n_genes: int,
        expression_activation: nn.Module,
        gate: bool = True,
    ):
        super().__init__()
        self.hidden = hidden
        self.expression = nn.Sequential(Head(hidden.n_out, n_genes), expression_activation)
        if gate:
            self.gate = Head(hidden.n_out, n_genes)

    @property
    def logits(self) -> nn.Module:
        """The head of expression, before its activation."""
        return self.expression[0]

    @property
    def activation(self) -> nn.Module:
        """From these logits to expression."""
        return self.expression[1]

    def forward(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., N, n_latent) to the hidden units that `expression` and `gate` read."""
        return self.hidden(z, covariates)

    def input_layers(self) -> list[nn.Module]:
        """The linear layers that read the input."""
        return self.hidden.input_layers(*(m for m in self.modules() if isinstance(m, Head)))


class Classifier(nn.Module):
    """Hidden layers and a linear layer to one logit a label."""

    def __init__(self, hidden: HiddenLayers, n_labels: int):
        super().__init__()
        self.hidden = hidden
        self.logits = Head(hidden.n_out, n_labels)

    def forward(self, z: Tensor) -> Tensor:
        """(..., N, n_latent) to (..., N, n_labels)."""
        return self.logits(self.hidden(z))


class GroupedClassifier(nn.Module):
    """Probability of the label's group times probability of the label within it, in log space.

    Parameters
    ----------
    labels, groups
        Classifiers to one logit a label, and to one logit a group.
    group_of_label
        The group of each label, (n_labels,) of integers.
    """

    def __init__(self, labels: Classifier, groups: Classifier, group_of_label: Tensor):
        super().__init__()
        self.labels = labels
        self.groups = groups
        self.register_buffer("group_of_label", group_of_label)

    def forward(self, z: Tensor) -> Tensor:
        """(..., N, n_latent) to log probabilities (..., N, n_labels)."""
        label_logits = self.labels(z)
        group_log_probs = self.groups(z).log_softmax(-1)
        result = group_log_probs[..., self.group_of_label] + label_logits
        for group in range(group_log_probs.shape[-1]):
            members = self.group_of_label == group
            within = label_logits[..., members].logsumexp(-1, keepdim=True)
            result = result - within * members
        return result


class CovariateEncoder(nn.Module):
    """Batch and further covariates as the features that join the input of a network.

    Parameters
    ----------
    n_batch
        Number of biological batches.
    n_cats_per_cov
        Number of categories of each categorical covariate.
    n_continuous
        Number of continuous covariates.
    batch_embedding_dim
        Represent the batch by a learned vector of this size; None is one-hot.
    """

    def __init__(
        self,
        n_batch: int,
        n_cats_per_cov: tuple[int, ...] = (),
        n_continuous: int = 0,
        batch_embedding_dim: int | None = None,
    ):
        super().__init__()
        dim = batch_embedding_dim
        self.embedding = None if dim is None else nn.Embedding(n_batch, dim)
        if self.embedding is not None:
            grows(self.embedding, weight=ByBatch(dim=0))
        self.n_categories = (n_batch if dim is None else 0, *n_cats_per_cov)
        self.n_dense = n_continuous + (batch_embedding_dim or 0)
        # A covariate of one category says nothing.
        self.n_one_hot = sum(n for n in self.n_categories if n > 1)

    def dense(self, x: Tensor, batch: Tensor, continuous: Tensor | None) -> Tensor:
        """Append continuous covariates and the embedded batch to `x` of shape (..., N, n)."""
        parts = [] if continuous is None else [continuous]
        if self.embedding is not None:
            parts.append(self.embedding(batch))
        return torch.cat([x, *(p.expand(*x.shape[:-1], -1) for p in parts)], dim=-1)

    def one_hot(self, batch: Tensor, categorical: Tensor | None) -> Tensor | None:
        """Indicators of batch and categorical covariates, (N, n_one_hot); None without any."""
        codes = [batch] if categorical is None else [batch, *categorical.unbind(-1)]
        pairs = zip(codes, self.n_categories, strict=True)
        parts = [nn.functional.one_hot(code, n) for code, n in pairs if n > 1]
        return torch.cat(parts, dim=-1) if parts else None

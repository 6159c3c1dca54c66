r"""Normals of a vector, whose log probability and KL divergence take one pass on the CPU.

.. math::
    \log \mathcal N(z; m, s) = \sum_k -\frac{(z_k - m_k)^2}{2 s_k^2} - \log s_k - \tfrac12\log 2\pi,
    \quad \mathrm{KL} = \sum_k \frac{s_k^2 + (m_k - m'_k)^2}{2 s_k'^2} - \tfrac12
    - \log\frac{s_k}{s'_k}

By torch each of their some thirty operations, with those of the gradient, goes through memory, and
with many labels, each of which is a row of each cell, that is a third of a step. Here rows are read
once forward and once backward.
"""

import torch
from pyro.distributions import Independent
from pyro.distributions import Normal as PyroNormal
from torch import Tensor
from torch.autograd import Function
from torch.distributions import kl_divergence
from torch.distributions.kl import register_kl

from pyro_scanvi.model import normal_kernels as kernels
from pyro_scanvi.model.kernels import slopes_of_plain
from pyro_scanvi.model.normal_kernels import are_rows


class Normal(PyroNormal):
    """Pyro's Normal, of which ``to_event(1)`` is a :class:`NormalVector`."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Independent:
        """As Pyro's."""
        n = reinterpreted_batch_ndims
        n = len(self.batch_shape) if n is None else n
        return NormalVector(self, 1) if n == 1 else super().to_event(n)


class NormalVector(Independent):
    """Independent Normals of the dimensions of a vector; batch (..., N) event (K,).

    Examples
    --------
    >>> q = Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).to_event(1)
    >>> q.log_prob(torch.tensor([0.0, 1.0]))
    tensor(-2.5310)
    >>> kl_divergence(q, Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    tensor(1.3069)
    """

    base_dist: Normal

    def log_prob(self, value: Tensor) -> Tensor:
        """Summed over the dimensions; broadcasts `value` against the batch shape."""
        base = self.base_dist
        if not are_rows(value, base.loc, base.scale):
            return super().log_prob(value)
        if base._validate_args:
            base._validate_sample(value)
        return _LogProb.apply(value, base.loc, base.scale)


@register_kl(NormalVector, NormalVector)
def _kl(q: NormalVector, p: NormalVector) -> Tensor:
    given = q.base_dist.loc, q.base_dist.scale, p.base_dist.loc, p.base_dist.scale
    if are_rows(*given) and not any(t.requires_grad for t in given[2:]):
        return _KL.apply(*given)
    return kl_divergence(q.base_dist, p.base_dist).sum(-1)


class _LogProb(Function):
    """log N(z; m, s), of rows of numbers."""

    @staticmethod
    def forward(ctx, value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(value, loc, scale)
        return kernels.by_row(kernels.log_probs, value, loc, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        given, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is to come
            value, loc, scale = given
            plain = PyroNormal(loc, scale).log_prob(value).sum(-1)
            return tuple(slopes_of_plain(plain, given, wanted, grad))
        return tuple(kernels.slopes(kernels.log_prob_slopes, grad, given, wanted))


class _KL(Function):
    """KL(N(m, s) || N(m', s')), of rows of numbers, of which m' and s' have no gradient."""

    @staticmethod
    def forward(ctx, loc: Tensor, scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale, p_loc, p_scale)
        return kernels.by_row(kernels.kls, loc, scale, p_loc, p_scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        given, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            q, p = PyroNormal(*given[:2]), PyroNormal(*given[2:])
            return tuple(slopes_of_plain(kl_divergence(q, p).sum(-1), given, wanted, grad))
        return *kernels.slopes(kernels.kl_slopes, grad, given, wanted[:2]), None, None

r"""What all cells share, with a prior and a posterior: dispersions, decoder weights, batch effects.

Each class adds a site to ``p_shared`` and ``q_shared`` and changes the step of the decoder that
reads it, so that several can be combined: ``class Both(BatchEffect, GlobalTheta): pass``. The
posteriors are of independent entries (mean field). Their KL is ``kl_shared`` in the history: it is
weighed against all cells, so a prior says less the more cells there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from pyro.distributions import Gamma, HalfCauchy, LogNormal, Normal, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.growth import ByBatch, grows
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError, check_positive, look_up, plain_arguments

THETA_PRIORS: dict[str, Callable[[Tensor, Tensor], TorchDistribution]] = {
    "lognormal": LogNormal,  # mean and standard deviation of log theta
    "gamma": Gamma,  # shape and rate of theta
}
HEADS = {"x": "x_decoder.expression.0", "z": "z_decoder.mean"}
START_LOG_SCALE = -2.0  # of posteriors: narrow, so that the means are learned first
START_LOG_SCALE_OF_WEIGHTS = -4.0  # a sum of hundreds of them is as narrow


class GlobalTheta(SCANVAE):
    r"""Inverse dispersions of genes as a global latent variable.

    .. math:: \theta_g \sim \mathrm{LogNormal}(a, b) \text{ or } \mathrm{Gamma}(a, b), \qquad
        q(\theta_g) = \mathrm{LogNormal}(m_g, s_g)

    :math:`m_g` is the ``log_theta`` of ``dispersion="gene"`` and starts where that starts. Gamma
    priors of inverse dispersions: Gelman et al. (2013), Bayesian Data Analysis, section 17.2. The
    KL is closed for a LogNormal prior, and sampled for another.

    Parameters
    ----------
    theta_prior
        "lognormal", "gamma", or a callable from two tensors (G,) to a distribution of positive
        numbers.
    theta_hyper
        Its two parameters; a mean and a standard deviation of log theta, or a shape and a rate.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If the model has no theta of each gene to be given a prior, or `theta_hyper` does not fit
        the prior.
    """

    @plain_arguments
    def __init__(
        self,
        *args: Any,
        theta_prior: str | Callable[[Tensor, Tensor], TorchDistribution] = "lognormal",
        theta_hyper: Sequence[float] = (0.0, 2.0),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        loc = getattr(getattr(self, "dispersion", None), "log_theta", None)
        if loc is None or loc.shape != (self.n_input,):
            raise InputError(
                "theta cannot have a prior here: GlobalTheta needs gene_likelihood='zinb', 'nb' or "
                "one of your own that reads theta, and dispersion='gene'"
            )
        self.theta_prior = look_up(THETA_PRIORS, theta_prior, "theta_prior")
        self.theta_hyper = _checked_hyper(self.theta_prior, theta_hyper)
        self.theta_log_scale = nn.Parameter(torch.full_like(loc, START_LOG_SCALE))

    def p_shared(self) -> dict[str, TorchDistribution]:
        """The prior of theta; batch () event (G,)."""
        a, b = (self.theta_log_scale.new_full((self.n_input,), h) for h in self.theta_hyper)
        return super().p_shared() | {"theta": self.theta_prior(a, b).to_event(1)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """LogNormals of theta; batch () event (G,)."""
        q = LogNormal(self.dispersion.log_theta, self.theta_log_scale.exp())
        return super().q_shared() | {"theta": q.to_event(1)}

    def decode_log_theta(self, hidden: Tensor, y: Tensor, cells: Cells) -> Tensor:
        """Log of the draw, (G,) or (S, 1, G)."""
        return cells.shared["theta"].log()


class NormalWeights(SCANVAE):
    r"""The last linear layer of a decoder has weights with a Normal prior.

    .. math:: W_{gh} \sim \mathcal N(0, s^2), \qquad q(W_{gh}) = \mathcal N(m_{gh}, v_{gh})

    m are the weights of the layer, which start as they do without a prior. The bias stays a
    parameter. Blundell et al. (2015), ICML, arXiv 1505.05424 (weight uncertainty by mean field).

    Parameters
    ----------
    weights_of
        "x", the layer to the expression of genes, (G, H), or "z", that to the mean of p(z | u, y),
        (K, H).
    weight_scale
        Standard deviation s.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If there is no such layer, or `weight_scale` is not positive.
    """

    @plain_arguments
    def __init__(self, *args: Any, weights_of: str = "x", weight_scale: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_positive(weight_scale=weight_scale)
        self.weight_scale = weight_scale
        self.random_head = look_up(HEADS, weights_of, "weights_of")
        start = torch.full_like(self._loc, START_LOG_SCALE_OF_WEIGHTS)
        self.weights_log_scale = nn.Parameter(start)

    @property
    def _loc(self) -> Tensor:
        return self.get_submodule(self.random_head).weight  # type: ignore[return-value]

    def p_shared(self) -> dict[str, TorchDistribution]:
        """N(0, s^2) of each weight; batch () event of the layer's shape."""
        zero = torch.zeros_like(self._loc)
        return super().p_shared() | {"weights": Normal(zero, self.weight_scale).to_event(2)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """Normals of the weights; batch () event of the layer's shape."""
        q = Normal(self._loc, self.weights_log_scale.exp())
        return super().q_shared() | {"weights": q.to_event(2)}

    def drawn_weights(self, shared: Mapping[str, Tensor]) -> Tensor:
        """The weights from what is drawn, (G, H) or (S, 1, G, H)."""
        return shared["weights"]

    def decode_logits(self, hidden: Tensor, cells: Cells) -> Tensor:
        """Linear in `hidden`, by the weights that were drawn, (..., N, G)."""
        return self._drawn(self.x_decoder.logits, cells)(hidden)

    def p_z(self, u: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """p(z | u, y), its mean by the weights that were drawn; batch (..., N) event (K,)."""
        mean = self._drawn(self.z_decoder.mean, cells)
        return Normal(*self.z_decoder.heads(self.z_decoder.hidden(u, y), mean)).to_event(1)

    def _drawn(self, head: nn.Module, cells: Cells) -> Callable[[Tensor], Tensor]:
        """The layer with drawn weights; another one as it is."""
        if head is not self.get_submodule(self.random_head):
            return head
        weights = without_cells(self.drawn_weights(cells.shared), 2)
        return lambda hidden: hidden @ weights.mT + cast(Tensor, head.bias)


class HorseshoeWeights(NormalWeights):
    r"""The last linear layer of a decoder has weights with a horseshoe prior: most are near 0.

    .. math:: W_{gh} = \tau\, \lambda_{gh}\, w_{gh}, \qquad w_{gh} \sim \mathcal N(0, 1), \quad
        \lambda_{gh} \sim \mathrm{C}^+(0, 1), \quad \tau \sim \mathrm{C}^+(0, t)

    Carvalho, Polson and Scott (2010), Biometrika 97:465, non-centred: the sites are w
    (``weights``), lambda (``weights_local``) and tau (``weights_global``), independent in the prior
    and in the posterior, which is Normal for w and LogNormal for the scales. W starts as the layer
    does without a prior. The KLs of the scales have no closed form here and are sampled.

    Parameters
    ----------
    weights_of
        As for :class:`NormalWeights`.
    global_scale
        t, the scale of tau.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If there is no such layer, or `global_scale` is not positive.
    """

    @plain_arguments
    def __init__(self, *args: Any, global_scale: float = 1.0, **kwargs: Any):
        super().__init__(*args, weight_scale=1.0, **kwargs)
        check_positive(global_scale=global_scale)
        self.global_scale = global_scale
        spread = self._loc.detach().std()
        self._loc.data /= spread  # w of unit size, tau of the size of the weights
        self.weights_log_scale.data -= spread.log()
        self.local_loc = nn.Parameter(torch.zeros_like(self._loc))
        self.local_log_scale = nn.Parameter(torch.full_like(self._loc, START_LOG_SCALE))
        self.global_loc = nn.Parameter(spread.log())
        self.global_log_scale = nn.Parameter(torch.full_like(spread, START_LOG_SCALE))

    def p_shared(self) -> dict[str, TorchDistribution]:
        """Half-Cauchy scales beside w; events of the layer's shape and ()."""
        one = torch.ones_like(self._loc)
        return super().p_shared() | {
            "weights_local": HalfCauchy(one).to_event(2),
            "weights_global": HalfCauchy(self.global_scale * one.mean()),
        }

    def q_shared(self) -> dict[str, TorchDistribution]:
        """LogNormal scales beside w."""
        return super().q_shared() | {
            "weights_local": LogNormal(self.local_loc, self.local_log_scale.exp()).to_event(2),
            "weights_global": LogNormal(self.global_loc, self.global_log_scale.exp()),
        }

    def drawn_weights(self, shared: Mapping[str, Tensor]) -> Tensor:
        """tau lambda w, (G, H) or (S, 1, G, H)."""
        tau = shared["weights_global"][..., None, None]
        return tau * shared["weights_local"] * shared["weights"]


class BatchEffect(SCANVAE):
    r"""The batch adds to the log expression of each gene, by effects with a Normal prior.

    .. math:: \log \rho_g(z, b, c) = \log \rho_g(z, c) + \delta_{bg} + \mathrm{const}, \qquad
        \delta_{bg} \sim \mathcal N(0, s^2)

    where the constant makes proportions sum to 1; there is none with a size factor. The posterior
    is a Normal for each batch and gene. That of a new batch of a query starts as the prior: nothing
    is known of it, and draws of its expression are as unsure as that. Training on the query moves
    it.

    Parameters
    ----------
    effect_scale
        Standard deviation s of an effect, in nats of expression.
    decoder_sees_batch
        The decoder reads the batch beside, as it does by default; an effect is then what the
        decoder leaves over, and says little by itself.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If `effect_scale` is not positive.
    """

    @plain_arguments
    def __init__(
        self,
        *args: Any,
        effect_scale: float = 0.5,
        decoder_sees_batch: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_positive(effect_scale=effect_scale)
        self.effect_scale, self.decoder_sees_batch = effect_scale, decoder_sees_batch
        start = torch.zeros(self.n_batch, self.n_input)
        self.effect_loc = nn.Parameter(start)
        self.effect_log_scale = nn.Parameter(start + math.log(effect_scale) + START_LOG_SCALE)
        grows(
            self,
            effect_loc=ByBatch(dim=0, start=partial(_with_new, value=0.0)),
            effect_log_scale=ByBatch(dim=0, start=partial(_with_new, value=math.log(effect_scale))),
        )

    def p_shared(self) -> dict[str, TorchDistribution]:
        """N(0, s^2) of each effect; batch () event (B, G)."""
        zero = torch.zeros_like(self.effect_loc)
        return super().p_shared() | {"batch_effect": Normal(zero, self.effect_scale).to_event(2)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """Normals of the effects; batch () event (B, G)."""
        q = Normal(self.effect_loc, self.effect_log_scale.exp())
        return super().q_shared() | {"batch_effect": q.to_event(2)}

    def decode_hidden(self, z: Tensor, cells: Cells) -> Tensor:
        """As if all cells were of the first batch, unless the decoder sees the batch too."""
        return super().decode_hidden(z, cells if self.decoder_sees_batch else _of_one_batch(cells))

    def decode_expression(self, hidden: Tensor, cells: Cells) -> Tensor:
        """rho times the exponential of the effect; proportions again where they are ones."""
        effect = without_cells(cells.shared["batch_effect"][..., cells.batch, :], 2)
        rho = super().decode_expression(hidden, cells) * effect.exp()
        return rho if self.use_size_factor_key else rho / rho.sum(-1, keepdim=True)


def _checked_hyper(
    prior: Callable[[Tensor, Tensor], TorchDistribution], hyper: Sequence[float]
) -> tuple[float, float]:
    """Two numbers that the prior takes."""
    try:
        first, second = map(float, hyper)
        prior(torch.tensor(first), torch.tensor(second))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"theta_hyper={hyper!r}, expected the two parameters of theta_prior: mean and standard "
            "deviation of log theta of a 'lognormal', shape and rate of a 'gamma'"
        ) from error
    return first, second


def without_cells(draw: Tensor, event_dim: int) -> Tensor:
    """Draws ``(S, 1, *event)`` as ``(S, *event)``, an axis of the event in the place of the cells.

    A single draw has the event alone and stays.
    """
    return draw if draw.ndim == event_dim else draw.squeeze(-event_dim - 1)


def _of_one_batch(cells: Cells) -> Cells:
    return replace(cells, batch=torch.zeros_like(cells.batch))


def _with_new(old: Tensor, own: Tensor, value: float) -> Tensor:
    """A start: new batches have one value."""
    return torch.cat([old, own[len(old) :] * 0 + value])

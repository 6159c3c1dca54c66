r"""Objectives to train with: parts that :meth:`SCANVI.train` binds to a model.

A part is called with the model and the plan, and gives a :class:`~.objective.Bound`: the loss of a
minibatch. It is a frozen dataclass, a class or a function; what it is called, and its settings, are
written into the record of the run.

The importance-weighted bound of a cell (Burda et al. 2016, ICLR, arXiv 1509.00519, eq. 8), from K
draws of z, of u for each label, and of a latent l:

.. math::

    \log \frac1K \sum_{k} \sum_y p(y)\,
        \frac{p(x \mid z_k, l_k, y)\, p(z_k \mid u_{ky}, y)\, p(u_{ky})\, p(l_k)}
             {q(z_k \mid x)\, q(u_{ky} \mid z_k, y)\, q(l_k \mid x)}
    \le \log p(x) \text{ in expectation.}

The sum over y is exact, so no gradient needs a score function; what is known of the label weighs
its terms, so that a known label takes the place of the sum. The bound of a minibatch is the sum
over its cells, times N / n: RenyiELBO, which weighs whole minibatches, bounds no cell. Sites that
all cells share are drawn once; their KL stays outside the logarithm: E over q(shared) of the sum
over cells, minus KL_shared, bounds log p of the data.

With the weights :math:`w_k` of that mean, Renyi's bound of a cell (Li & Turner 2016, NeurIPS, arXiv
1602.02311) is

.. math::

    \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha},

the weighted bound at alpha = 0, and in the limit of 1 the mean of the :math:`\log w_k`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from pyro.distributions import OneHotCategorical, TorchDistribution
from pyro.poutine import Trace
from torch import Tensor

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.objective import (
    CLOSED_FORM,
    WEIGHTED,
    Bound,
    BoundModule,
    LayeredELBO,
    ObjectiveParts,
    SemiSupervisedELBO,
    is_shared,
    masked,
)
from pyro_scanvi.model.pyro_internals import Site, enumeration_dim, enumeration_weight, sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_flags,
    check_not_negative,
    make_plain,
)


class ObjectiveSettings(Protocol):
    """What a plan tells the objective; more of it is at hand."""

    @property
    def classification_ratio(self) -> float:
        """Weight of the classification term against the ELBO of one cell."""

    @property
    def feed_labels(self) -> bool:
        """Whether the bound is conditioned on known labels, or they are marginalised."""


class Objective(Protocol):
    """A part that makes the loss of a model: ``SCANVI.train(objective=...)``."""

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> Bound:
        """The loss of this model, as this plan weighs it."""


class DifferentiableLoss(Protocol):
    """Those of Pyro's losses that are a tensor with a gradient."""

    def loss(self, model: Callable, guide: Callable, cells: Cells) -> float:
        """Of all cells, in nats."""

    def differentiable_loss(self, model: Callable, guide: Callable, cells: Cells) -> Tensor:
        """The same as a tensor."""


def _given(vae: SCANVAE, plan: ObjectiveSettings) -> dict[str, Any]:
    """The arguments of an objective that model and plan give."""
    return {
        "classifier": vae.q_y,
        "classification_ratio": plan.classification_ratio,
        "feed_labels": plan.feed_labels,
        "point": vae.latent_point,
        "evidence": vae.evidence,
    }


@dataclass(frozen=True)
class ELBO:
    """The paper's: :class:`SemiSupervisedELBO`, with settings; types shape the latent space.

    Attributes
    ----------
    closed_form, weighted, num_particles
        As of :class:`SemiSupervisedELBO`.
    kind
        That class, or a subclass of one's own with the same arguments.

    Examples
    --------
    >>> from pyro_scanvi import SCANVAE, ELBO
    >>> from pyro_scanvi.training.settings import Plan
    >>> vae = SCANVAE(n_input=5, n_labels=2, n_hidden=4, n_latent=2)
    >>> cells = Cells.from_counts(torch.ones(6, 5))
    >>> ELBO(num_particles=4)(vae, Plan()).parts(cells).elbo().shape
    torch.Size([6])
    """

    closed_form: Iterable[str] = CLOSED_FORM
    weighted: Iterable[str] = WEIGHTED
    num_particles: int = 1
    kind: type[SemiSupervisedELBO] = SemiSupervisedELBO

    def __post_init__(self) -> None:
        make_plain(self)
        check_at_least(1, num_particles=self.num_particles)

    @property
    def hides_labels(self) -> bool:
        """Whether no label moves the encoder."""
        return self.kind.hides_labels

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> BoundModule:
        """The loss of this model, as this plan weighs it."""
        return self.kind(
            **_given(vae, plan),
            closed_form=self.closed_form,
            weighted=self.weighted,
            num_particles=self.num_particles,
        )(vae.model, vae.guide)


@dataclass(frozen=True)
class Layered(ELBO):
    """What :meth:`SCANVI.train` minimises unless told: :class:`LayeredELBO`, with settings.

    The latent space is that of scVI, and types are learned upon it.
    """

    kind: type[SemiSupervisedELBO] = LayeredELBO


@dataclass(frozen=True)
class IWAE:
    """The importance-weighted bound of each cell; see :class:`ImportanceWeightedELBO`.

    Attributes
    ----------
    num_particles, sum_labels, weighted
        As there.
    """

    num_particles: int = 5
    sum_labels: bool = True
    weighted: Iterable[str] = WEIGHTED

    def __post_init__(self) -> None:
        make_plain(self)
        check_at_least(1, num_particles=self.num_particles)
        check_flags(sum_labels=self.sum_labels)

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> BoundModule:
        """The loss of this model, as this plan weighs it."""
        return Renyi(0.0, self.num_particles, self.sum_labels, self.weighted)(vae, plan)


@dataclass(frozen=True)
class Renyi:
    """Renyi's bound of each cell; see :class:`ImportanceWeightedELBO`.

    Attributes
    ----------
    alpha
        At least 0. At 0 the bound is that of :class:`IWAE`; at 1 it is the mean over draws, which
        without `sum_labels` is the ELBO; above 1 it lies below that.
    num_particles, sum_labels, weighted
        As there.
    """

    alpha: float = 0.5
    num_particles: int = 5
    sum_labels: bool = True
    weighted: Iterable[str] = WEIGHTED

    def __post_init__(self) -> None:
        make_plain(self)
        check_not_negative(alpha=self.alpha)
        check_at_least(1, num_particles=self.num_particles)
        check_flags(sum_labels=self.sum_labels)

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> BoundModule:
        """The loss of this model, as this plan weighs it."""
        return ImportanceWeightedELBO(
            **_given(vae, plan),
            weighted=self.weighted,
            num_particles=self.num_particles,
            sum_labels=self.sum_labels,
            alpha=self.alpha,
        )(vae.model, vae.guide)


@dataclass(frozen=True)
class PyroLoss:
    """A loss of Pyro as it is, without classification term and KL weight.

    History has one column of it, `elbo`: minus the loss, in nats per cell.

    Attributes
    ----------
    loss
        With a ``differentiable_loss``, such as ``TraceEnum_ELBO(max_plate_nesting=1)``;
        TraceGraph_ELBO and RenyiELBO have none, and are for :class:`pyro.infer.SVI`.
    """

    loss: DifferentiableLoss

    def __post_init__(self) -> None:
        if not callable(getattr(self.loss, "differentiable_loss", None)):
            raise InputError(
                f"PyroLoss: {type(self.loss).__name__} has no differentiable_loss; give one that "
                "has, such as TraceEnum_ELBO(max_plate_nesting=1), or train by pyro.infer.SVI"
            )

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> "BoundLoss":
        """The loss of this model; of the plan it reads whether labels are fed."""
        return BoundLoss(self.loss, vae.model, vae.guide, plan.feed_labels)


class BoundLoss:
    """A loss of Pyro bound to a model and a guide."""

    kl_weight: float | None = None  # Pyro's losses have none

    def __init__(
        self, loss: DifferentiableLoss, model: Callable, guide: Callable, feed_labels: bool
    ):
        self.loss, self.model, self.guide, self.feed_labels = loss, model, guide, feed_labels

    def parts(self, cells: Cells) -> ObjectiveParts:
        """The loss, nats per cell."""
        seen = cells if self.feed_labels else cells.hide_labels()
        arguments = self.model, self.guide, seen
        if torch.is_grad_enabled():
            return ObjectiveParts(self.loss.differentiable_loss(*arguments) / cells.n_obs)
        # Some refuse to be differentiable where nothing has a gradient.
        return ObjectiveParts(cells.x.new_tensor(self.loss.loss(*arguments) / cells.n_obs))


class ImportanceWeightedELBO(SemiSupervisedELBO):
    r"""The importance-weighted bound of each cell, and the classification term.

    With a KL weight w other than 1 the factors of the `weighted` sites count to the power of w
    inside the logarithm, :math:`(p(u) / q(u \mid z, y))^w`, and there is a bound at w = 1 alone.
    The gradient of the encoder gets noisier as K rises (Rainforth et al. 2018, arXiv 1802.04537).

    ``ObjectiveParts.bounds``, and so `elbo` in the history, is the bound itself, at w = 1;
    reconstruction and KLs are the expected costs at the same draws, which sum to minus the ELBO.

    Parameters
    ----------
    classifier, classification_ratio, feed_labels, kl_weight, weighted, point, evidence
        As of :class:`SemiSupervisedELBO`. No KL of a cell is taken in closed form.
    num_particles
        Number K of draws of each cell.
    sum_labels
        True: the sum over y of the module's docstring, the tightest. It holds no q(y | z), so the
        classifier learns from the classification term alone. False: instead of
        :math:`\log \sum_y`, :math:`\mathbb E_{q(y \mid z_k)}[\log \cdot - \log q(y \mid z_k)]` of
        each draw, which is lower, trains the classifier on cells without a label, and is the ELBO
        at K = 1.
    alpha
        Of Renyi's bound; 0 is the importance-weighted one.

    Raises
    ------
    InputError
        When it is called: if a site of the guide is drawn without a gradient (no ``rsample``) and
        is not enumerated, or cells' sites differ in scale.
    """

    def __init__(
        self,
        classifier: Callable[[Tensor, Cells], OneHotCategorical] | None,
        classification_ratio: float = 50.0,
        feed_labels: bool = True,
        kl_weight: float = 1.0,
        weighted: Iterable[str] = WEIGHTED,
        point: Callable[[TorchDistribution], Tensor] = attrgetter("mean"),
        num_particles: int = 5,
        evidence: Callable[[Cells], Tensor] | None = None,
        sum_labels: bool = True,
        alpha: float = 0.0,
    ):
        settings = classification_ratio, feed_labels, kl_weight, (), weighted, point, num_particles
        super().__init__(classifier, *settings, evidence)
        self.sum_labels, self.alpha = sum_labels, alpha

    def bound(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The sum over cells, with their scales, minus the KL of what they share; a scalar."""
        p, q = sites(model_trace), sites(guide_trace)
        _check_drawn_with_gradients(q)
        cells = self._log_mean_weight(model_trace, guide_trace, self.kl_weight)
        bound = (_scale(p) * self.num_particles * cells).sum()
        for here, sign in ((p, 1), (q, -1)):
            for site in filter(is_shared, here.values()):
                bound = bound + sign * site["log_prob"].sum()
        return bound

    def cell_bounds(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The bound of each cell at KL weight 1, (N,)."""
        return self._log_mean_weight(model_trace, guide_trace, 1.0)

    def _log_mean_weight(self, model_trace: Trace, guide_trace: Trace, kl_weight: float) -> Tensor:
        """Log of the mean weight of the draws of each cell, or of their power mean, (N,)."""
        log_weight = self._log_joint(sites(model_trace), sites(guide_trace), kl_weight)
        if not self.sum_labels:
            log_weight = enumeration_weight(guide_trace) * log_weight
        by_draw = log_weight.reshape(-1, self.num_particles, log_weight.shape[-1])  # labels, K, N
        of_draw = by_draw.logsumexp(0) if self.sum_labels else by_draw.sum(0)
        return log_power_mean(of_draw, 1 - self.alpha)

    def _log_joint(self, p: dict[str, Site], q: dict[str, Site], kl_weight: float) -> Tensor:
        """Log p - log q of all sites of a cell, for each enumerated value, (..., N)."""

        def weighted(name: str, log_prob: Tensor) -> Tensor:
            return kl_weight * log_prob if name in self.weighted else log_prob

        total = torch.zeros(())
        for name, site in _of_cells(p).items():
            total = total + weighted(name, masked(site))
        for name, site in _of_cells(q).items():
            if not (self.sum_labels and enumeration_dim(site) is not None):
                total = total - weighted(name, masked(site))
        return total


def log_power_mean(log_weight: Tensor, power: float) -> Tensor:
    """Logarithm of the power mean over the first dimension; at a power of 0 the geometric one.

    Examples
    --------
    >>> log_power_mean(torch.tensor([1.0, 3.0]).log(), 1).exp()
    tensor(2.)
    """
    if power == 0:
        return log_weight.mean(0)
    return ((power * log_weight).logsumexp(0) - math.log(len(log_weight))) / power


def _of_cells(trace: dict[str, Site]) -> dict[str, Site]:
    """The samples inside the plate of cells."""
    drawn = {name: site for name, site in trace.items() if site["type"] == "sample"}
    return {name: site for name, site in drawn.items() if not is_shared(site)}


def _scale(p: dict[str, Site]) -> Tensor:
    """What each cell counts, (N,) or (); InputError where its sites differ."""
    scales = {
        name: torch.as_tensor(site["scale"], dtype=site["unscaled_log_prob"].dtype)
        for name, site in _of_cells(p).items()
    }
    (first, scale), *others = scales.items()
    for name, other in others:
        if not scale.equal(other):
            raise InputError(
                f"site {name!r} has a scale of its own, not that of {first!r}: inside the "
                "logarithm of IWAE it has no meaning; scale all sites of a cell, or take ELBO()"
            )
    return scale


def _check_drawn_with_gradients(q: dict[str, Site]) -> None:
    for name, site in q.items():
        enumerated = site["type"] == "sample" and enumeration_dim(site) is not None
        if site["type"] == "sample" and not (enumerated or site["fn"].has_rsample):
            raise InputError(
                f"site {name!r} of the guide, {site['fn']}, is drawn without a gradient (it has no "
                "rsample) and not enumerated, which IWAE needs; take ELBO()"
            )

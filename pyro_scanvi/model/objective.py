r"""The objective: TraceEnum_ELBO with closed-form KLs, a KL weight and a classification term.

For a minibatch of cells, the loss is

.. math::

    \frac1N \Big[ -\log p(x \mid z, l) + \log q(z \mid x) - \log p(z \mid u, y)
        + w \big( \mathrm{KL}_u + \mathrm{KL}_y + \mathrm{KL}_l \big) \Big]
    - r \cdot \log \sum_y q(y \mid \mathbb E\, q(z \mid x))\, p(e \mid y)

in nats per cell, with the expectation over the label exact, w the KL weight, r the classification
ratio, and e what is known of the label: the last term is the cross-entropy where that is an exact
label. It is averaged over the labelled cells of the minibatch, and apart from those over the cells
of whose label something else is known, such as a set: many coarse labels do not thin out few exact
ones.
Where cells have weights, each cell's term counts as often as its weight says, in both averages.
Further observed sites add their -log p. Sites that all cells share, outside the plate, add
:math:`w\,\mathrm{KL} / N`, in closed form where one is known.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, ClassVar, Protocol

import torch
from pyro.distributions import Delta, Normal, OneHotCategorical, TorchDistribution
from pyro.infer.elbo import ELBOModule
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.contracts import check_traces
from pyro_scanvi.model.pyro_internals import (
    HeldBelow,
    RevisedELBO,
    Site,
    Sites,
    Unannounced,
    enumeration_weight,
    in_cells,
    set_log_prob,
    sites,
)

SMALLEST_WEIGHT = 1e-30  # a minibatch without labels has no classification term
CLOSED_FORM = ("u", "l")
WEIGHTED = ("u", "y", "l")


@dataclass(frozen=True)
class ObjectiveParts:
    """A loss, and what it is made of. Nats; per cell means shape (N,).

    An objective of one's own tells what it knows: ``ObjectiveParts(loss)`` is enough to train.

    Attributes
    ----------
    loss
        What is minimised, a scalar per cell of the data set; the only part with a gradient.
    reconstructions
        For each observed site its expected -log p, such as -log p(x | z, l, y, s), of each cell.
    kl
        For each latent site its expected log q - log p, unweighted, of each cell.
    kl_shared
        The same for each site outside the plate of cells, whole.
    n_obs
        Number of cells that share those.
    classification
        -log sum_y q(y | E z) p(e | y) of each cell, the cross-entropy at an exact label; 0 where
        nothing is known of the label. It is read where there are logits.
    informative
        Whether anything is known of the label of each cell; None where those are the labelled.
    logits
        Logits of q(y | E z), (N, L); None without a classifier.
    bounds
        The bound of each cell at KL weight 1, without shared sites, where it is not minus the sum
        of its parts; None where it is.
    """

    loss: Tensor
    reconstructions: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    kl_shared: dict[str, Tensor] = field(default_factory=dict)
    n_obs: int = 1
    classification: Tensor | None = None
    informative: Tensor | None = None
    logits: Tensor | None = None
    bounds: Tensor | None = None

    @property
    def reconstruction(self) -> Tensor:
        """Of all observed sites, (N,)."""
        return torch.stack(list(self.reconstructions.values())).sum(0)

    @property
    def kl_global(self) -> Tensor:
        """KL of all sites outside the plate, whole, a scalar."""
        return sum(self.kl_shared.values(), self.loss.new_zeros(()))

    def elbo(self) -> Tensor:
        """Evidence lower bound of each cell at KL weight 1, (N,); of shared sites its share.

        Where only the loss is known, minus the loss, a scalar.
        """
        if self.bounds is not None:
            elbo = self.bounds
        elif self.reconstructions:
            elbo = -self.reconstruction - sum(self.kl.values())
        else:
            elbo = -self.loss.detach()
        return elbo - self.kl_global / self.n_obs if self.kl_shared else elbo


class Bound(Protocol):
    """An objective bound to a model: all that training asks of it.

    Attributes
    ----------
    kl_weight
        Weight of the KLs; training sets it before each step. None says that there is none; a
        plan that changes it is then refused.
    """

    @property
    def kl_weight(self) -> float | None:
        """A number, or None."""

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None: ...

    def parts(self, cells: Cells) -> ObjectiveParts:
        """Loss of a minibatch, nats per cell, and its parts."""


class BoundModule(ELBOModule):
    """The objective bound to a model and a guide: ``bound(cells)`` is a differentiable loss.

    Of methods of a network it owns no parameters: hand those of the network to an optimiser.
    """

    elbo: "SemiSupervisedELBO"

    @property
    def kl_weight(self) -> float:
        """That of the objective."""
        return self.elbo.kl_weight

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None:
        self.elbo.kl_weight = weight

    def parts(self, cells: Cells) -> ObjectiveParts:
        """Loss and its parts."""
        with Unannounced():
            return self.elbo.parts(self.model, self.guide, cells)


class SemiSupervisedELBO(RevisedELBO):
    """ELBO with enumerated labels, closed-form KLs, a KL weight, and a classification term.

    Use it as any Pyro loss, ``SVI(vae.model, vae.guide, optim, SemiSupervisedELBO(vae.q_y))``, or
    in the module form, ``SemiSupervisedELBO(vae.q_y)(vae.model, vae.guide)``.

    Parameters
    ----------
    classifier
        From z and the cells to the distribution of the label, :meth:`SCANVAE.q_y`; None leaves
        the classification term out.
    classification_ratio
        Weight r of the cross-entropy against one cell's ELBO.
    feed_labels
        True: a labelled cell contributes log p(x, y), the paper's bound (Xu et al. 2021, eq. 5).
        False: every cell is marginalised over its label, as scvi-tools does.
    kl_weight
        Weight w of the KLs of `weighted`; may be changed between steps.
    closed_form
        Sites whose KL is taken in closed form where one is known, beside those outside the plate.
        Only for sites whose prior depends on nothing that their posterior sample feeds.
    weighted
        Sites whose KL is weighted by w, beside those outside the plate.
    point
        From q(z | x) to the z that is classified: its mean, or :meth:`SCANVAE.latent_point`.
    evidence
        From cells to log p(e | y), (N, L), in the classification term: :meth:`SCANVAE.evidence`,
        which knows of label noise; None takes labels as they are given.
    num_particles
        Number K of draws of each cell's sites, all at once, over which the ELBO is averaged: the
        same in expectation, with 1 / K of the variance that comes of them. Sites that all cells
        share are drawn once.

    Examples
    --------
    >>> from pyro_scanvi import SCANVAE
    >>> vae = SCANVAE(n_input=30, n_labels=2, n_hidden=8, n_latent=3)
    >>> cells = Cells.from_counts(torch.ones(6, 30), label=torch.tensor([0, 1, -1, -1, -1, -1]))
    >>> objective = SemiSupervisedELBO(vae.q_y)(vae.model, vae.guide)
    >>> objective(cells).backward()
    >>> parts = objective.parts(cells)
    >>> sorted(parts.kl)
    ['u', 'y', 'z']
    >>> parts.classification.shape
    torch.Size([6])
    """

    hides_labels: ClassVar[bool] = False  # from the encoder

    def __init__(
        self,
        classifier: Callable[[Tensor, Cells], OneHotCategorical] | None,
        classification_ratio: float = 50.0,
        feed_labels: bool = True,
        kl_weight: float = 1.0,
        closed_form: Iterable[str] = CLOSED_FORM,
        weighted: Iterable[str] = WEIGHTED,
        point: Callable[[TorchDistribution], Tensor] = attrgetter("mean"),
        num_particles: int = 1,
        evidence: Callable[[Cells], Tensor] | None = None,
    ):
        super().__init__(num_particles, max_plate_nesting=1, vectorize_particles=num_particles > 1)
        self.classifier = classifier
        self.classification_ratio = classification_ratio
        self.feed_labels = feed_labels
        self.kl_weight = kl_weight
        self.closed_form = frozenset(closed_form)
        self.weighted = frozenset(weighted)
        self.point = point
        self.evidence = evidence

    def __call__(self, model: Callable, guide: Callable) -> BoundModule:
        """Bind to a model and a guide, for use under a torch optimiser."""
        return BoundModule(model, guide, self)  # type: ignore[arg-type]  # methods will do

    def parts(self, model: Callable, guide: Callable, cells: Cells) -> ObjectiveParts:
        """Run guide and model on a minibatch; the loss and its parts."""
        seen = cells if self.feed_labels else cells.hide_labels()
        model_trace, guide_trace = self.traces(model, guide, seen)
        elbo = self.bound(model_trace, guide_trace) / cells.n_obs
        wrong, informative, logits = self._classify(guide_trace, cells)
        weight = _classification_weight(cells, informative)
        classification = _mean(wrong, weight * cells.labelled, cells.pooled)
        classification = classification + _mean(wrong, weight * ~cells.labelled, cells.pooled)
        loss = self.classification_ratio * classification - elbo
        with torch.no_grad():
            costs = _expected_costs(model_trace, guide_trace, len(cells), self.num_particles)
            bounds = self.cell_bounds(model_trace, guide_trace)
        classified = wrong.detach(), informative, logits
        return ObjectiveParts(loss, *costs, cells.n_obs, *classified, bounds)

    def cell_bounds(self, model_trace: Trace, guide_trace: Trace) -> Tensor | None:
        """The bound of each cell, (N,), where it is not minus the sum of expected costs."""
        return None

    def _classify(self, guide_trace: Trace, cells: Cells) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cost of each cell at the point of q(z | x), whether it has one, and logits."""
        if self.classifier is None:
            nothing = cells.x.new_zeros(len(cells))
            return nothing, nothing.bool(), None
        posterior = sites(guide_trace)
        shared = {name: s["value"] for name, s in posterior.items() if is_shared(s)}
        cells = replace(cells, shared=shared)
        z = self._point(posterior["z"]["fn"])
        z = z if self.num_particles == 1 else z[0]  # all particles have one q(z | x)
        q_y = self.classifier(z, cells)
        return *classification_cost(q_y, self._evidence(cells, q_y.logits.shape[-1])), q_y.logits

    def _point(self, q_z: TorchDistribution) -> Tensor:
        """The z at which cells are classified."""
        return self.point(q_z)

    def _evidence(self, cells: Cells, n_labels: int) -> Tensor:
        if self.evidence is None:
            return cells.label_evidence(n_labels).sum(0)
        return self.evidence(cells)

    def differentiable_loss(self, model, guide, cells: Cells) -> Tensor:
        """The loss, a scalar with a gradient."""
        return self.parts(model, guide, cells).loss

    def loss(self, model, guide, cells: Cells) -> float:
        """The loss as a number."""
        return self.parts(model, guide, cells).loss.item()

    def loss_and_grads(self, model, guide, cells: Cells) -> float:
        """The loss as a number, after a backward pass."""
        loss = self.parts(model, guide, cells).loss
        loss.backward()
        return loss.item()

    def check(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Latent sites have counterparts, and nothing broadcasts; where Pyro validates."""
        check_traces(model_trace, guide_trace)

    def known(self, model: Sites, guide: Sites) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """-KL(q || p) for log p and 0 for log q, where a closed form is asked for and known."""
        shared = {name for name, site in guide.items() if is_shared(site)}
        names = (self.closed_form | shared).intersection(model, guide)
        found = ((name, _closed_form(model[name], guide[name])) for name in sorted(names))
        kl = {name: value for name, value in found if value is not None}
        return {n: -v for n, v in kl.items()}, {n: torch.zeros_like(v) for n, v in kl.items()}

    def revise(self, model_trace: Trace, guide_trace: Trace) -> None:
        """The weight of the KLs."""
        if self.kl_weight == 1:
            return
        p, q = sites(model_trace), sites(guide_trace)
        shared = {name for name, site in q.items() if is_shared(site)}
        for name in (self.weighted | shared).intersection(p):
            _weigh(p[name], q.get(name), self.kl_weight)
        for name in shared.difference(p):  # auxiliary draws of an AutoGuide
            set_log_prob(q[name], self.kl_weight * q[name]["unscaled_log_prob"])


class LayeredELBO(SemiSupervisedELBO):
    r"""The same value, with the gradient of M1 and M2 learned one upon the other.

    Encoder, decoder and dispersion follow the ELBO of scVI, in which z has a standard Normal prior
    and cells have no type; the networks of u, y and z given u and y, and the classifier, follow the
    ELBO of scANVI at that z, which they do not move:

    .. math:: \nabla \big[ \log p(x \mid z, l) - \log q(z \mid x) + \log \mathcal N(z; 0, I) \big]
        + \nabla_{z \text{ fixed}} \big[ \log p(z \mid u, y) - w\,(\mathrm{KL}_u + \mathrm{KL}_y)
        + r \log q(y \mid \bar z) \big]

    So neither labels nor what the classifier makes of other cells can pull cells together (but for
    what a dispersion by label tells of them), and labelled cells lie among their kind. It is how
    Kingma et al. (2014, arXiv 1406.5298, section 2) train M1+M2, in one run. The encoder is not
    that of the tightest bound: for the best ELBO take :class:`SemiSupervisedELBO`.

    Examples
    --------
    >>> from pyro_scanvi import SCANVAE
    >>> vae = SCANVAE(n_input=30, n_labels=2, n_hidden=8, n_latent=3)
    >>> cells = Cells.from_counts(torch.ones(6, 30), label=torch.tensor([0, 1, -1, -1, -1, -1]))
    >>> losses = []
    >>> for kind in (SemiSupervisedELBO, LayeredELBO):
    ...     _ = torch.manual_seed(0)
    ...     losses.append(kind(vae.q_y)(vae.model, vae.guide)(cells).item())
    >>> losses[0] == losses[1]
    True
    """

    hides_labels: ClassVar[bool] = True

    def traces(self, model: Callable, guide: Callable, *args: Any) -> tuple[Trace, Trace]:
        """Traces in which what depends on z does not move it, but for the counts."""
        return super().traces(model, HeldBelow("z")(guide), *args)

    def known(self, model: Sites, guide: Sites) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradient of a standard Normal prior in the place of that of p(z | u, y)."""
        of_model, of_guide = super().known(model, guide)
        if "z" in model and "z" in guide:
            p, z = model["z"]["fn"], guide["z"]["value"]
            standard = Normal(torch.zeros_like(z), 1.0).to_event(p.event_dim).log_prob(z)
            of_model["z"] = p.log_prob(z.detach()) + standard - standard.detach()
        return of_model, of_guide

    def _point(self, q_z: TorchDistribution) -> Tensor:
        return super()._point(q_z).detach()


def classification_cost(q_y: OneHotCategorical, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """-log sum_y q(y | z) p(e | y) of each cell, and whether anything is known, (N,) each."""
    informative = (evidence != 0).any(-1)
    cost = -(q_y.logits + evidence).logsumexp(-1)
    return torch.where(informative, cost, torch.zeros_like(cost)), informative


def _mean(values: Tensor, weight: Tensor, pooled: Callable[[Tensor], Tensor]) -> Tensor:
    """Weighted mean; 0 where nothing has a weight."""
    return (weight * values).sum() / pooled(weight.sum()).clamp(min=SMALLEST_WEIGHT)


def _classification_weight(cells: Cells, informative: Tensor) -> Tensor:
    """Weight of each cell in the classification term, (N,); 0 where nothing is known."""
    counted = informative if cells.classified is None else informative & cells.classified
    return counted.to(cells.x.dtype) if cells.weight is None else counted * cells.weight


def _closed_form(p: Site, q: Site) -> Tensor | None:
    """KL(q || p) at a site; None where no closed form is known.

    Pyro's of a Delta leaves out its log density, by which an AutoGuide changes variables.
    """
    if isinstance(q["fn"], Delta):
        return None
    try:
        return kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None


def _weigh(p: Site, q: Site | None, weight: float) -> None:
    """Weigh log p - log q at a site, in log p only: log q also carries enumeration's weights."""
    log_q = 0.0 if q is None else q["unscaled_log_prob"]
    set_log_prob(p, weight * (p["unscaled_log_prob"] - log_q) + log_q)


def _expected_costs(
    model_trace: Trace, guide_trace: Trace, n_cells: int, n_particles: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """For each site E_q[log q - log p], over all enumerated sites of the guide.

    Of observed sites -log p and of latent ones, of each cell; of those outside the plate, whole.
    """
    weight, posterior = enumeration_weight(guide_trace), sites(guide_trace)
    prior = sites(model_trace)
    observed: dict[str, Tensor] = {}
    latent: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, site in (prior | {n: s for n, s in posterior.items() if n not in prior}).items():
        if site["type"] != "sample":
            continue
        cost = masked(posterior[name]) if name in posterior else torch.zeros(())
        if name in prior:
            cost = cost - masked(site)
        if is_shared(site):
            shared[name] = cost.sum()
            continue
        place = observed if site["is_observed"] else latent
        place[name] = (weight * cost).reshape(-1, n_cells).sum(0) / n_particles
    return observed, latent, shared


def is_shared(site: Site) -> bool:
    """Whether it is a sample outside the plate of cells."""
    return site["type"] == "sample" and not in_cells(site)


def masked(site: Site) -> Tensor:
    """Log probability at a site, unscaled; 0 where its mask leaves a cell out."""
    log_prob = site["unscaled_log_prob"]
    if not isinstance(site["mask"], Tensor):
        return log_prob
    return torch.where(site["mask"], log_prob, torch.zeros_like(log_prob))

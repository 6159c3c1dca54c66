r"""Marginal likelihood and labels under a model or a guide of one's own, by weights of traces.

The guide is traced, the model replayed at its draws. With S draws h of all latent sites of a cell
but those that are enumerated, e,

.. math:: \hat p(x, y) = \frac1S \sum_s \sum_{e: y} \frac{p(x, h_s, e)}{q(h_s \mid x, e)},

an unbiased estimate; its logarithm lies below :math:`\log p(x, y)` in expectation and rises with S
(Burda et al. 2016, ICLR, arXiv 1509.00519, theorem 1). Enumerated are the label y, and what the
guide marks so. A site that the guide does not draw comes from the model's prior, at a weight of 1.
Sites that all cells share are drawn from their posterior and not weighted. Scales and weights of
cells are not read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.pyro_internals import Site, enumeration_dim, in_cells, own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import check_finite, log_prob_of_events, parts, total
from pyro_scanvi.validation import InputError

LABEL = ("y", "y_unobserved")  # the latent site of the label; the second beside observed ones
DIM_OF_DRAWS = -2
FIRST_ENUMERATED = DIM_OF_DRAWS - 1


@dataclass(frozen=True)
class TraceWeights:
    """An estimate of log p(x, y) by weights of traces.

    Attributes
    ----------
    vae
        The model, in eval mode.
    by_label
        Whether the answer is needed for each value of y.
    """

    vae: SCANVAE
    by_label: bool

    def numbers_per_draw(self, cells: Cells) -> int:
        """Size of the largest tensor of one draw of `cells`.

        Raises
        ------
        InputError
            For a model or a guide with a site that cannot be weighed; it is named.
        """
        cells = cells.hide_labels()
        self.check_sites(cells)
        model, guide = self._traces(cells, 1)
        self._check_label(model)
        sizes = [site["fn"].shape().numel() for site in _of_cells(model).values()]
        return max(*sizes, log_weights(model, guide).numel() * self.vae.n_hidden)

    def log_joint(self, cells: Cells, n_samples: int, n_per_pass: int) -> Tensor:
        """Log p(x, y) of each label, (N, L), or of a model without labels log p(x), (N, 1).

        In nats, float64. Known labels are not read.
        """
        cells = cells.hide_labels()
        log_sum = torch.full((), -math.inf, dtype=torch.float64, device=cells.x.device)
        for n in parts(n_samples, n_per_pass):
            model, guide = self._traces(cells, n)
            log_weight = log_weights(model, guide).expand(*_shape(model, guide, n, len(cells)))
            log_sum = torch.logaddexp(log_sum, _by_label(log_weight, model))
        return (log_sum - math.log(n_samples)).T

    def label_given_states(
        self, cells: Cells, n_samples: int, n_per_pass: int, evidence: Tensor
    ) -> Tensor:
        """Refused: which sites of a story of one's own are the states is not known."""
        raise InputError(
            f"{type(self.vae).__name__} has a model or a guide of its own, of which "
            "method='states' cannot read p(z | y); ask for method='bayes', which weighs all sites"
        )

    def of_draws(
        self, cells: Cells, n_samples: int, shared: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Log weight of each draw, summed over what is enumerated: log p(x) is their logmeanexp.

        Known labels are not read.

        Parameters
        ----------
        cells, n_samples
            A minibatch of N cells, and the number S of draws.
        shared
            A value for each draw of what all cells share, (S, 1, ...) each; None draws them from
            their posterior.

        Returns
        -------
        Tensor
            (S, N) in nats, float64.
        """
        model, guide = self._traces(cells.hide_labels(), n_samples, shared)
        log_weight = log_weights(model, guide).expand(*_shape(model, guide, n_samples, len(cells)))
        summed = log_weight.reshape(-1, n_samples, len(cells)).logsumexp(0)
        check_finite(summed, cells, dim=-1)
        return summed

    def _traces(
        self, cells: Cells, n_samples: int, shared: Mapping[str, Tensor] | None = None
    ) -> tuple[Trace, Trace]:
        """Of the model replayed, and of the guide: (..., S, N), enumerated sites on the left."""
        given = dict(shared or {})
        guide = poutine.condition(self.vae.guide, data=given)
        guide = poutine.infer_config(guide, _enumerated_label)
        guide = poutine.enum(guide, first_available_dim=FIRST_ENUMERATED)
        with pyro.validation_enabled(False), pyro.plate("draws", n_samples, dim=DIM_OF_DRAWS):
            guide_trace = poutine.trace(guide).get_trace(cells)
            model = poutine.condition(self.vae.model, data=given)
            model = poutine.infer_config(model, _enumerated_label)
            # Its dimensions go on to the left of those of the guide.
            model = poutine.enum(poutine.replay(model, trace=guide_trace))
            return poutine.trace(model).get_trace(cells), guide_trace

    def check_sites(self, cells: Cells) -> None:
        """Refuse what no weight makes right, before anything is enumerated or vectorised."""
        guide = poutine.trace(self.vae.guide).get_trace(cells)
        q, shared = own_sites(guide), self.vae.p_shared()
        self._check_none_observed(q)
        model = poutine.trace(poutine.replay(self.vae.model, trace=guide)).get_trace(cells)
        p = own_sites(model)
        self._check_all_weighed(q, p)
        for name, site in (p | q).items():
            self._check_plates(name, site)
        for name, site in p.items():
            if not in_cells(site) and (name not in shared or name not in q):
                raise InputError(
                    f"{self._name}: {name} is outside the plate of cells, and not in p_shared and "
                    "q_shared, so that its posterior is not known; put it into both, or sample it "
                    "within `with self.plate(cells)`"
                )

    def _check_none_observed(self, q: dict[str, Site]) -> None:
        for name, site in q.items():
            if site["is_observed"]:
                raise InputError(
                    f"{self._name}: the guide has the observed site {name}, which is no part of a "
                    "density that a weight can be taken of; leave it to the objective"
                )

    def _check_all_weighed(self, q: dict[str, Site], p: dict[str, Site]) -> None:
        latent = {name for name, site in p.items() if not site["is_observed"]}
        for name, site in q.items():
            if name not in latent and not site["infer"].get("is_auxiliary"):
                raise InputError(
                    f"{self._name}: the guide draws {name}, which is no latent site of the model, "
                    "so that there is nothing to weigh it by; sample it in the model too"
                )

    def _check_plates(self, name: str, site: Site) -> None:
        others = [plate.name for plate in site["cond_indep_stack"] if plate.name != "cells"]
        if others:
            raise InputError(
                f"{self._name}: {name} lies in the plate {', '.join(others)} too; make that a "
                "dimension of the event, by .to_event(1)"
            )

    def _check_label(self, model: Trace) -> None:
        if not self.by_label:
            return
        site, n_labels = _label(model), self.vae.n_labels
        n = 0 if site is None else len(site["fn"].enumerate_support(expand=False))
        if n != n_labels:
            raise InputError(
                f"{self._name}: the model has no latent site y with a value for each of the "
                f"{n_labels} labels ({f'it has {n} values' if n else 'there is none'}), and Bayes' "
                "rule and feed_labels=True weigh those; sample y in the model, or ask for the "
                "marginal likelihood without labels"
            )

    @property
    def _name(self) -> str:
        return type(self.vae).__name__


def log_weights(model: Trace, guide: Trace) -> Tensor:
    """log p - log q of the latent and observed sites of cells, float64.

    (..., S, N) or what broadcasts to it, one dimension on the left for each enumerated site, whose
    q is not read.
    """
    q = {n: s for n, s in _of_cells(guide).items() if enumeration_dim(s) is None}
    p = _of_cells(model)
    read = {n: s for n, s in p.items() if s["is_observed"] or n in q or enumeration_dim(s)}
    log_p, log_q = (total(map(site_log_prob, found.values())) for found in (read, q))
    return log_p - log_q


def _by_label(log_weight: Tensor, model: Trace) -> Tensor:
    """Summed over draws and what else is enumerated, (L, N); without labels (1, N)."""
    site, n_cells = _label(model), log_weight.shape[-1]
    dim = None if site is None else enumeration_dim(site)
    if dim is None:
        return log_weight.reshape(-1, n_cells).logsumexp(0, keepdim=True)
    first = log_weight.movedim(dim, 0)
    return first.reshape(len(first), -1, n_cells).logsumexp(1)


def _shape(model: Trace, guide: Trace, n_samples: int, n_cells: int) -> list[int]:
    """Of weights, with their whole extent in each dimension."""
    extents = {-1: n_cells, DIM_OF_DRAWS: n_samples}
    for site in (_of_cells(guide) | _of_cells(model)).values():
        dim = enumeration_dim(site)
        if dim is not None:
            extents[dim] = len(site["fn"].enumerate_support(expand=False))
    return [extents.get(dim, 1) for dim in range(min(extents), 0)]


def _enumerated_label(site: Any) -> Any:
    """What tells Pyro to enumerate the label, wherever it is latent."""
    can_be = getattr(site["fn"], "has_enumerate_support", False) and not site["is_observed"]
    return {"enumerate": "parallel"} if site["name"] in LABEL and can_be else {}


def _label(trace: Trace) -> Site | None:
    """The latent site of the label, if there is an enumerated one."""
    found = [s for n, s in _of_cells(trace).items() if n in LABEL and enumeration_dim(s)]
    return found[0] if found else None


def _of_cells(trace: Trace) -> dict[str, Site]:
    return {name: site for name, site in own_sites(trace).items() if in_cells(site)}


def site_log_prob(site: Site) -> Tensor:
    """Unscaled, with masked entries 0, in float64."""
    log_prob = log_prob_of_events(site["fn"], site["value"])
    mask = True if site["mask"] is None else site["mask"]
    return torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)

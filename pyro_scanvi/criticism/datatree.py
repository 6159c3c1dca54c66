r"""A trained model as an ArviZ DataTree: for ArviZ's plots, ``loo`` and ``compare``.

**What the log likelihood is.** ``log_likelihood`` has :math:`\log p(x_i \mid \theta_s)` of each
cell, its states integrated out by importance sampling, at draws :math:`\theta_s` of what all cells
share. ``loo`` of it estimates the density of a cell given all others,
:math:`\log p(x_i \mid x_{-i})`, with regard to what is shared. Two things it is not:

- The weights of networks are points, fitted to the very cells: nothing leaves a cell out of them.
  Of a model that shares nothing the log likelihood does not vary with the draw; ``arviz_stats.loo``
  refuses that ("All tail values are the same"), and :func:`leave_one_out` gives the sum of the log
  likelihoods as they are, with p_loo = 0. Such numbers compare models on cells that they were not
  trained on (``adata=``, or ``indices=model.validation_indices``), not on others.
- ``log_likelihood_given_states`` has :math:`\log p(x_i \mid h_{is}, \theta_s)` at draws of a cell's
  own states. Leaving that cell out, its states would come from the prior: the weights of ``loo``
  then have to turn a posterior into a prior, their Pareto shapes are far above 0.7, and what it
  gives is no estimate of anything. It stands in a group of its own, so that ``loo`` does not find
  it; it is for looking at cells.

Draws are those of the guide q, not of the posterior. Where q of what is shared is far from the
posterior, see ``arviz_stats.loo_approximate_posterior``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pyro
import torch
from rich.progress import track
from torch import Tensor

from pyro_scanvi.criticism.optional import arviz_base, arviz_stats
from pyro_scanvi.criticism.story import Story, Values, numbers, shared_draws, states_of, tell
from pyro_scanvi.data.minibatches import CellData, Cells, ordered_loader, total_counts
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.model.pyro_internals import Site, own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    at_once,
    check_finite,
    evaluating,
    minibatch_size,
    observed_sites,
    parts,
    seeded,
)
from pyro_scanvi.posterior.importance import PASS_ELEMENTS
from pyro_scanvi.posterior.traces import TraceWeights, site_log_prob
from pyro_scanvi.validation import InputError, check_at_least, check_flags, plain_arguments

MOST_NUMBERS = 100_000_000  # 400 MB
DIMS = {"z": ["latent"], "u": ["latent"], "y": ["label"], "x": ["gene"], "l": ["size"]}
SEEN, GIVEN_STATES = "observed_data", "log_likelihood_given_states"
Found = dict[str, dict[str, list[np.ndarray]]]  # group -> variable -> of each minibatch (S, N, ...)


@plain_arguments
def to_datatree(
    model: SCANVI,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    n_draws: int = 100,
    n_chains: int = 1,
    n_integration: int = 100,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    prior: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    max_numbers: int = MOST_NUMBERS,
    batch_size: int | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> Any:
    r"""Draws of a trained model by the names of cells, genes and labels, as ArviZ reads them.

    Parameters
    ----------
    model
        Trained.
    adata, indices, batch_size
        As in :meth:`~pyro_scanvi.SCANVI.predict`.
    n_draws, n_chains
        Draws of a chain, and chains. Draws of a guide are independent, so that chains are but an
        arrangement, for plots that compare them.
    n_integration
        Draws K over which the states of a cell are integrated, for each draw of what all cells
        share; of a model that shares nothing, once for all ``n_draws * n_chains * K``.
    posterior_predictive, log_likelihood, prior
        Whether to have these groups; "prior" comes with "prior_predictive".
    dims, coords
        Names of the dimensions of a site of one's own, beside that of cells where it has one, and
        their values, by dimension; others are called as ArviZ does, ``protein_dim_0``.
    max_numbers
        Most numbers to be drawn, 4 bytes each.
    seed
        Of the draws; None draws on from torch's generator.
    progress_bar
        Whether to show one.

    Returns
    -------
    DataTree
        ``posterior``: states of cells, (chain, draw, cell, ...), given what is known of labels,
        and what all share, (chain, draw, ...); y is one-hot. ``posterior_predictive`` and
        ``observed_data``: what is seen of cells. ``log_likelihood``: variable "cells",
        :math:`\log p(x_i \mid \theta_s)` of all that is seen of a cell, without labels, in nats;
        ``log_likelihood_given_states``: at the states' draws, and not for ``loo``; see the module.
        ``prior`` and ``prior_predictive``: the story at the covariates and the library of these
        cells. ``constant_data``: batch, library where it is read, label as it was given.

    Raises
    ------
    InputError
        If more than `max_numbers` would be drawn; for cells that do not fit the model.
    ImportError
        Without ArviZ.
    """
    base = arviz_base()
    check_at_least(1, n_draws=n_draws, n_chains=n_chains, n_integration=n_integration)
    flags = {"posterior_predictive": posterior_predictive, "log_likelihood": log_likelihood}
    check_flags(**flags, prior=prior)
    data, names = model.encoded(adata, indices)
    wanted = _Wanted(n_draws * n_chains, n_integration, **flags, prior=prior)
    with seeded(seed), evaluating(model.module, data):
        first = data[np.arange(1)].to(model.device)
        drawing = _Drawing(model.module, wanted, *_shared(model.module, first, wanted.n))
        _check_size(drawing, first, len(data), max_numbers)
        loader = ordered_loader(data, min(minibatch_size(batch_size), drawing.cells_at_once(first)))
        minibatches = track(loader, "drawing", disable=not progress_bar)
        found = [drawing(cells.to(model.device)) for cells in minibatches]
    groups = _chained(_joined(found, drawing.of_all()), n_chains)
    groups[SEEN] = {name: np.concatenate([f[SEEN][name] for f in found]) for name in found[0][SEEN]}
    groups["constant_data"] = _constant(model, data)
    named = {"cell": names, "gene": model.fields.genes, "label": model.fields.classes}
    given = {name: [*values] for name, values in {**named, **(coords or {})}.items()}
    variables = {**_of_cells(groups), **groups[SEEN]}
    return base.from_dict(groups, coords=given, dims=_dims(drawing, variables, dims or {}))


def _of_cells(groups: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """States, (N, ...) of one draw each."""
    return {name: value[0, 0] for name, value in groups["posterior"].items()}


def leave_one_out(tree: Any, pointwise: bool | None = None) -> Any:
    """``arviz_stats.loo`` of a tree of :func:`to_datatree`, of a model that shares nothing too.

    ArviZ refuses log likelihoods that are the same at all draws; then nothing is left to smooth,
    each weight is the same, and the answer is the sum of the log likelihoods. Draws of a guide are
    independent, so their relative efficiency is 1.

    Parameters
    ----------
    tree
        With the group ``log_likelihood``.
    pointwise
        Whether to keep the numbers of each cell, as ``arviz_stats.loo`` has it.

    Returns
    -------
    ELPDData
        As ``arviz_stats.loo`` gives it, and ``arviz_stats.compare`` takes it. For what it says and
        what it does not, see the module.

    Raises
    ------
    ImportError
        Without ArviZ.
    """
    log_p = tree["log_likelihood"]["cells"]
    draws = ["chain", "draw"]
    given: dict[str, Any] = {}
    if bool((log_p.max(draws) == log_p.min(draws)).all()):
        n = log_p.sizes["chain"] * log_p.sizes["draw"]
        given = {"log_weights": 0 * log_p - math.log(n), "pareto_k": 0 * log_p.max(draws)}
    return arviz_stats().loo(tree, var_name="cells", pointwise=pointwise, reff=1.0, **given)


@dataclass(frozen=True)
class _Wanted:
    """Number of draws, and which groups."""

    n: int
    n_integration: int
    posterior_predictive: bool
    log_likelihood: bool
    prior: bool


@dataclass(frozen=True)
class _Drawing:
    """What is drawn for a minibatch of cells."""

    vae: SCANVAE
    wanted: _Wanted
    shared: Values  # of the guide, (S, 1, ...)
    prior_shared: Values  # of the model

    def __call__(self, cells: Cells) -> dict[str, dict[str, np.ndarray]]:
        """By group and variable, (S, N, ...); what is seen, (N, ...)."""
        found = {SEEN: self._seen(cells), **self._posterior(cells)}
        if self.wanted.log_likelihood:
            found["log_likelihood"] = {"cells": self._log_likelihood(cells)}
        return found | (self._prior(cells) if self.wanted.prior else {})

    def cells_at_once(self, cell: Cells) -> int:
        """How many cells make a pass of a few draws."""
        return at_once(numbers(self.vae, len(cell)), PASS_ELEMENTS)

    def of_all(self) -> dict[str, Values]:
        """What all cells share, (S, ...), by group."""
        priors = {"prior": self.prior_shared} if self.wanted.prior else {}
        groups = {"posterior": self.shared} | priors
        return {g: {n: v.squeeze(1) for n, v in values.items()} for g, values in groups.items()}

    def _posterior(self, cells: Cells) -> dict[str, dict[str, np.ndarray]]:
        def ask(story: Story, n: int) -> dict[str, Values]:
            p, _ = story.traces(cells, n)
            seen, found = observed_sites(own_sites(p)), {"posterior": _values(states_of(p))}
            if self.wanted.posterior_predictive:
                found["posterior_predictive"] = {name: s["fn"].sample() for name, s in seen.items()}
            if self.wanted.log_likelihood:
                found[GIVEN_STATES] = {name: site_log_prob(s) for name, s in seen.items()}
            return found

        return self._in_passes(cells, self.shared, ask)

    def _prior(self, cells: Cells) -> dict[str, dict[str, np.ndarray]]:
        library = self.vae.observed_library(cells)
        blank = replace(cells.hide_labels(), size_factor=library)

        def ask(story: Story, n: int) -> dict[str, Values]:
            with pyro.validation_enabled(False), pyro.plate("draws", n, dim=-2):
                states, _, seen = tell(self.vae, blank, story.shared)
            return {"prior": states, "prior_predictive": seen}

        return self._in_passes(cells, self.prior_shared, ask)

    def _log_likelihood(self, cells: Cells) -> np.ndarray:
        """log p(x | what is shared), (S, N)."""
        weights, (n, k) = TraceWeights(self.vae, by_label=False), self._integrated
        of_draw, found, start = weights.numbers_per_draw(cells), [], 0
        for size in parts(n, at_once(of_draw, PASS_ELEMENTS)):
            given = {m: v[start : start + size] for m, v in self.shared.items()}
            sizes = parts(k, at_once(of_draw * size, PASS_ELEMENTS))
            found.append(_log_means(weights, cells, size, sizes, given))
            start += size
        return torch.cat(found).expand(self.wanted.n, len(cells)).cpu().numpy()

    @property
    def _integrated(self) -> tuple[int, int]:
        """Values of what is shared, and draws of states for each."""
        n, k = self.wanted.n, self.wanted.n_integration
        return (n, k) if self.shared else (1, n * k)

    def _in_passes(
        self, cells: Cells, shared: Values, ask: Callable[[Story, int], dict[str, Values]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """What `ask` answers, a few draws at a time, joined along the draws."""
        found: Found = {}
        start = 0
        for n in parts(self.wanted.n, at_once(numbers(self.vae, len(cells)), PASS_ELEMENTS)):
            story = Story(self.vae, {m: v[start : start + n] for m, v in shared.items()})
            for group, values in ask(story, n).items():
                for name, value in values.items():
                    whole = value.expand(n, len(cells), *value.shape[2:])
                    check_finite(whole, cells, dim=1)
                    found.setdefault(group, {}).setdefault(name, []).append(whole.cpu().numpy())
            start += n
        return {g: {m: np.concatenate(v) for m, v in vs.items()} for g, vs in found.items()}

    def _seen(self, cells: Cells) -> dict[str, np.ndarray]:
        p, _ = Story(self.vae, {m: v[:1] for m, v in self.shared.items()}).traces(cells, 1)
        seen = observed_sites(own_sites(p))
        return {name: site["value"].cpu().numpy() for name, site in seen.items()}


def _shared(vae: SCANVAE, cell: Cells, n: int) -> tuple[Values, Values]:
    """Draws of what all cells share, from its posterior and from its prior."""
    TraceWeights(vae, by_label=False).check_sites(cell)
    posterior = shared_draws(vae.guide, cell, n)
    return posterior, shared_draws(vae.model, cell, n)


def _values(sites: Mapping[str, Site]) -> Values:
    return {name: site["value"] for name, site in sites.items()}


def _log_means(
    weights: TraceWeights, cells: Cells, n: int, sizes: list[int], shared: Values
) -> Tensor:
    """Log of the mean weight of draws, some at a time, for each of n values of what is shared."""
    drawn = []
    for k in sizes:
        given = {name: value.repeat_interleave(k, 0) for name, value in shared.items()}
        drawn.append(weights.of_draws(cells, n * k, given).reshape(n, k, len(cells)))
    return torch.cat(drawn, 1).logsumexp(1) - math.log(sum(sizes))


def _joined(
    found: list[dict[str, dict[str, np.ndarray]]], of_all: dict[str, Values]
) -> dict[str, dict[str, np.ndarray]]:
    """Along cells, (S, N, ...), with what all share, (S, ...)."""
    groups = {
        group: {name: np.concatenate([f[group][name] for f in found], 1) for name in values}
        for group, values in found[0].items()
        if group != SEEN and values
    }
    for group, values in of_all.items():
        groups[group] |= {name: value.cpu().numpy() for name, value in values.items()}
    return groups


def _chained(
    groups: dict[str, dict[str, np.ndarray]], n_chains: int
) -> dict[str, dict[str, np.ndarray]]:
    """(chain, draw, ...)."""
    return {
        group: {name: v.reshape(n_chains, -1, *v.shape[1:]) for name, v in values.items()}
        for group, values in groups.items()
    }


def _constant(model: SCANVI, data: CellData) -> dict[str, np.ndarray]:
    """Of each cell: its batch by name, label as given ("" if not exactly) and counts in total."""
    labels = np.array([*map(str, model.fields.classes), ""])
    batches = np.array([*map(str, model.fields.batches)])
    library = total_counts(data.counts)[0]
    return {"batch": batches[data.batch], "given_label": labels[data.label], "counts": library}


def _dims(drawing: _Drawing, seen: Mapping[str, np.ndarray], own: Mapping) -> dict[str, list[str]]:
    """Names of dimensions of each variable, without those of draws."""
    named = {**DIMS, **{name: [*values] for name, values in own.items()}}
    shared = {**drawing.shared, **drawing.prior_shared}
    of_all = {n: named.get(n, _numbered(n, v.ndim - 2)) for n, v in shared.items()}
    cells = {n: ["cell", *named.get(n, _numbered(n, v.ndim - 1))] for n, v in seen.items()}
    constant = dict.fromkeys(["batch", "given_label", "counts", "cells"], ["cell"])
    return {**cells, **of_all, **constant}


def _numbered(name: str, n: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(n)]


def _check_size(drawing: _Drawing, cell: Cells, n_cells: int, most: int) -> None:
    """Refuse what would not fit, before it is drawn."""
    p, _ = Story(drawing.vae, {m: v[:1] for m, v in drawing.shared.items()}).traces(cell, 1)
    states = sum(s["value"].numel() for s in states_of(p).values())
    seen = sum(s["value"].numel() for s in observed_sites(own_sites(p)).values())
    wanted = drawing.wanted
    of_cell = (states + seen * wanted.posterior_predictive) + (states + seen) * wanted.prior
    total = of_cell * n_cells * wanted.n
    if total > most:
        raise InputError(
            f"{wanted.n} draws of {n_cells} cells are {total:,} numbers, {of_cell} a cell and draw "
            f"({seen} of them what is seen of it), more than max_numbers={most:,}; choose cells by "
            "indices=, take fewer draws, leave out posterior_predictive or prior, or raise it"
        )

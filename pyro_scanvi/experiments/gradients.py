r"""How noisy the gradient is, part by part, at the same weights and the same cells.

With two independent draws g, g' of the gradient of a part,

.. math::

    \tfrac12 \|g - g'\|^2 \quad\text{and}\quad g^\top g'

have the means :math:`\mathrm{tr}\,\mathrm{Cov}(g)` and :math:`\|\mathbb E g\|^2`: each pair is a
measurement of noise and of signal, unbiased and independent of the other pairs. A step of given
precision costs variance times seconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import torch
from matplotlib.axes import Axes
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.experiments.intervals import bootstrap_interval, check_seeds, summary, tidy
from pyro_scanvi.experiments.plotting import of_metric, points
from pyro_scanvi.experiments.running import (
    apart,
    cells_of,
    chosen,
    clock,
    copy_of,
    tracked,
)
from pyro_scanvi.model.objective import Bound
from pyro_scanvi.model.objectives import (
    ELBO,
    IWAE,
    BoundLoss,
    DifferentiableLoss,
    Objective,
    ObjectiveSettings,
    PyroLoss,
)
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.training.runs import check_objective
from pyro_scanvi.training.settings import Plan
from pyro_scanvi.validation import InputError, check_at_least, check_flags

OF_PAIRS = ("variance", "signal")
N_TRIED = 2  # cells that an estimator is tried on


@dataclass(frozen=True)
class DrawnLabels:
    """A loss of Pyro with labels drawn from the guide, not enumerated: a score-function gradient.

    Attributes
    ----------
    loss
        Such as ``Trace_ELBO()``.
    """

    loss: DifferentiableLoss

    def __post_init__(self) -> None:
        PyroLoss(self.loss)  # refuses one without a gradient

    def __call__(self, vae: SCANVAE, plan: ObjectiveSettings) -> BoundLoss:
        """The loss of this model; of the plan it reads whether labels are fed."""
        guide = poutine.infer_config(vae.guide, _drawn)
        return BoundLoss(self.loss, vae.model, guide, plan.feed_labels)


def _drawn(site: Any) -> Any:
    return {"enumerate": None}


ESTIMATORS: dict[str, Objective] = {
    "ELBO": ELBO(),
    "sampled KLs": ELBO(closed_form=()),
    "5 particles": ELBO(num_particles=5),
    "20 particles": ELBO(num_particles=20),
    "IWAE, 5": IWAE(5, sum_labels=False),
    "TraceEnum_ELBO": PyroLoss(TraceEnum_ELBO(max_plate_nesting=1)),
    "Trace_ELBO, y drawn": DrawnLabels(Trace_ELBO()),
}


def gradient_noise(
    model: SCANVI,
    estimators: Mapping[str, Objective] = ESTIMATORS,
    *,
    n_pairs: int = 25,
    n_cells: int = 128,
    feed_labels: bool = True,
    seeds: Sequence[int] = (0,),
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Variance and signal of the gradient of each part of the network, and seconds.

    The loss is that of :class:`~pyro_scanvi.training.settings.Plan` without the classification
    term, so that all but IWAE have the same gradient in expectation: minus the ELBO in nats per
    cell. In eval mode: dropout is another noise. The model stays as it is.

    Parameters
    ----------
    model
        With the weights at which gradients are taken.
    estimators
        Objectives by name; :data:`ESTIMATORS`, or some of them and one's own.
    n_pairs
        Pairs of draws.
    n_cells
        Cells of the minibatch.
    feed_labels
        As in the plan: with labels, or with none.
    seeds
        Each has cells and draws of its own.
    progress_bar
        Show one.

    Returns
    -------
    DataFrame
        ``seed``, ``setting``, ``part`` (an attribute of the network, such as "z_encoder"),
        ``draw`` (the pair), ``metric``, ``value``. "variance" and "signal" in (nats per cell)^2,
        summed over the parameters of the part; "seconds" of one gradient, and "cost", variance
        times the mean seconds of the setting.

    Raises
    ------
    InputError
        For numbers below 1, more cells than there are, seeds that come twice, an objective that
        gives no loss.
    """
    check_at_least(1, n_pairs=n_pairs, n_cells=n_cells)
    check_flags(feed_labels=feed_labels, progress_bar=progress_bar)
    seeds, vae = check_seeds(seeds), copy_of(model)
    _check_estimators(model, vae, estimators, feed_labels)
    runs = [(seed, name) for seed in seeds for name in estimators]
    rows: list[dict] = []
    for seed, name in tracked(runs, len(runs), "gradients", progress_bar):
        cells = cells_of(model, chosen(model, n_cells, seed))
        with apart(seed), pyro.validation_enabled(False):
            bound = estimators[name](vae, _plan(feed_labels))
            for row in _noise(bound, vae, cells, n_pairs):
                rows.append({"seed": seed, "setting": name} | row)
    frame = tidy(rows)
    return pd.concat([frame, _costs(frame)], ignore_index=True)


def plot_gradient_noise(
    frame: pd.DataFrame, metric: str = "variance", ax: Axes | None = None
) -> Axes:
    """Variance, signal, seconds or cost of each setting, coloured by part, on a log scale.

    Intervals are bootstrapped over pairs. A signal that is not above 0 is not drawn.
    """
    table = noise_summary(of_metric(frame, metric))
    axis = points(table[table["mean"] > 0], colour="part", ax=ax)
    axis.set(xscale="log", xlabel=metric)
    return axis


def noise_summary(frame: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean of each setting, part and metric, with bootstrap intervals over pairs of all seeds.

    They are of the minibatches at hand; how much others differ is seen over seeds, by
    ``summary(frame, by=("setting", "part", "metric"))``.
    """
    pairs = frame.assign(pair=frame["seed"].astype(str) + "/" + frame["draw"].astype(str))
    by = ("setting", "part", "metric")
    return summary(pairs, by, unit="pair", interval=bootstrap_interval, level=level)


def parameters_by_part(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by the attribute of the module that they belong to."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0], []).append(parameter)
    return parts


def pairs_of_gradients(
    loss: Callable[[], Tensor], parts: Mapping[str, list[nn.Parameter]], n_pairs: int
) -> Iterator[tuple[dict[str, tuple[float, float]], float]]:
    """For each pair variance and signal by part, and seconds of one gradient.

    Parameters
    ----------
    loss
        A draw of the loss, each time another.
    parts
        Parameters by part.
    n_pairs
        Number of pairs.
    """
    parameters = [p for members in parts.values() for p in members]
    for _ in range(n_pairs):
        now = clock(parameters[0].device)
        one, other = (
            torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
            for _ in range(2)
        )
        seconds = now() / 2
        measured, first = {}, 0
        for part, members in parts.items():
            here = slice(first, first + len(members))
            measured[part] = _variance_and_signal(one[here], other[here])
            first += len(members)
        yield measured, seconds


def _variance_and_signal(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """In float64: of a hundred thousand entries that are small beside the largest."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    variance = sum((a - b).square().sum().item() for a, b in pairs) / 2
    return variance, sum((a * b).sum().item() for a, b in pairs)


def _noise(bound: Bound, vae: SCANVAE, cells: Cells, n_pairs: int) -> Iterator[dict]:
    parts = parameters_by_part(vae)

    def loss() -> Tensor:
        return bound.parts(cells).loss

    torch.autograd.grad(loss(), [p for m in parts.values() for p in m], allow_unused=True)  # warm
    for draw, (measured, seconds) in enumerate(pairs_of_gradients(loss, parts, n_pairs)):
        for part, values in measured.items():
            for metric, value in zip(OF_PAIRS, values, strict=True):
                yield {"part": part, "draw": draw, "metric": metric, "value": value}
        yield {"part": "all", "draw": draw, "metric": "seconds", "value": seconds}


def _costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Variance times the mean seconds of the setting, for each pair."""
    seconds = of_metric(frame, "seconds").groupby("setting")["value"].mean()
    variance = of_metric(frame, "variance")
    value = variance["value"] * variance["setting"].map(seconds)
    return variance.assign(metric="cost", value=value)


def _plan(feed_labels: bool) -> Plan:
    return Plan(classification_ratio=0.0, feed_labels=feed_labels)


def _check_estimators(
    model: SCANVI, vae: SCANVAE, estimators: Mapping[str, Objective], feed_labels: bool
) -> None:
    if not estimators or not all(callable(e) for e in estimators.values()):
        raise InputError(
            f"estimators={estimators!r}, expected objectives by name, such as {{'ELBO': ELBO()}}"
        )
    cells = cells_of(model, range(min(N_TRIED, model.adata.n_obs)))
    for part in estimators.values():
        plan = Plan(classification_ratio=0.0, feed_labels=feed_labels, objective=part)
        check_objective(vae, plan, cells)

"""The states of a few cells by NUTS, with decoders fixed: the truth that the guide comes close to.

What NUTS leaves to doubt is told beside it: rank-normalised split R-hat and bulk effective sample
size (Vehtari et al. 2021, Bayesian Analysis 16:667, arXiv 1903.08008), by arviz-stats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.experiments.intervals import check_seeds, tidy
from pyro_scanvi.experiments.plotting import of_metric
from pyro_scanvi.experiments.running import (
    apart,
    clock,
    copy_of,
    some_cells,
    tracked,
)
from pyro_scanvi.model.pyro_internals import enumeration_dim, in_cells, own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError, check_at_least, check_flags

N_DRAWS_OF_GUIDE = 10_000  # where a guide has no moments in closed form
FEWEST_DRAWS = 4  # of which arviz-stats tells R-hat


def nuts_against_guide(
    model: SCANVI,
    *,
    positions: Sequence[int] | None = None,
    n_cells: int = 3,
    n_draws: int = 300,
    n_warmup: int = 300,
    max_tree_depth: int = 6,
    seeds: Sequence[int] = (0, 1, 2, 3),
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Mean and standard deviation of z by NUTS against those of q(z | x), cell by cell.

    u and z, and a latent library, are sampled, y is summed out; labels are taken as unknown, and
    what cells share is held at its posterior mean. Each seed is a chain, started at a draw of the
    guide; chains run one after the other. The model stays as it is.

    Parameters
    ----------
    model
        With the decoders and the guide.
    positions, n_cells
        Which cells of the training data, or how many, drawn at random.
    n_draws, n_warmup, max_tree_depth
        Of each chain.
    seeds
        Of the chains: two at least, as R-hat compares them.
    progress_bar
        Show one, over the chains.

    Returns
    -------
    DataFrame
        ``seed`` (of the chain), ``setting`` ("guide"), ``cell`` (name in obs), ``dim`` (of z),
        ``metric``, ``value``. "mean_difference", that of NUTS minus that of the guide, in standard
        deviations by NUTS; "sd_ratio", guide over NUTS; both of each chain. "rhat" and "ess" are of
        all chains together, told in the row of each. NaN is of a chain that did not move.
        "seconds" of each chain, an equal share of them for each cell and dimension.

    Raises
    ------
    InputError
        For fewer than two seeds or four draws, more cells than there are, and without arviz-stats.
    """
    check_at_least(1, n_cells=n_cells, n_warmup=n_warmup, max_tree_depth=max_tree_depth)
    check_at_least(FEWEST_DRAWS, n_draws=n_draws)
    check_flags(progress_bar=progress_bar)
    seeds, statistics = _chains(seeds), _arviz()
    names, cells = some_cells(model, positions, n_cells)
    vae = copy_of(model)
    chains, seconds = [], []
    for seed in tracked(seeds, len(seeds), "chains", progress_bar):
        now = clock(cells.x.device)
        chains.append(states_by_nuts(vae, cells, n_draws, n_warmup, max_tree_depth, seed)["z"])
        seconds.append(now())
    z = torch.stack(chains)  # chains, draws, N, K
    with apart(seeds[0]), torch.no_grad():
        mean, sd = moments(vae.q_z(vae.at_shared_points(cells)))
    spread = torch.where(z.std(1) > 0, z.std(1), torch.nan)
    found = {
        "mean_difference": (z.mean(1) - mean) / spread,
        "sd_ratio": sd / spread,
        "rhat": _of_all(statistics.rhat, z),
        "ess": _of_all(statistics.ess, z),
        "seconds": torch.tensor(seconds)[:, None, None].expand(z[:, 0].shape) / mean.numel(),
    }
    return _rows(found, seeds, names)


def states_by_nuts(
    vae: SCANVAE, cells: Cells, n_draws: int, n_warmup: int, max_tree_depth: int, seed: int
) -> dict[str, Tensor]:
    """Draws of the latent sites of cells, y summed out, by one chain.

    Parameters
    ----------
    vae
        In eval mode.
    cells
        A whole data set.
    n_draws, n_warmup, max_tree_depth
        Of the chain.
    seed
        Of its start and its draws.

    Returns
    -------
    dict
        ``u`` and ``z`` (draws, N, K), ``l`` (draws, N, 1) where it is latent.
    """
    with apart(seed):
        held = vae.at_shared_points(cells).shared
        model = poutine.condition(vae.model, data=dict(held)) if held else vae.model
        start = _start(vae, cells)
        kernel = NUTS(
            model, init_strategy=init_to_value(values=start), max_tree_depth=max_tree_depth
        )
        chain = MCMC(kernel, num_samples=n_draws, warmup_steps=n_warmup, disable_progbar=True)
        chain.run(cells)
        return {name: chain.get_samples()[name].detach() for name in start}


def moments(q: TorchDistribution) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, of 10,000 draws where it has none in closed form."""
    try:
        return q.mean, q.variance.sqrt()
    except NotImplementedError:
        drawn = q.sample(torch.Size([N_DRAWS_OF_GUIDE]))
        return drawn.mean(0), drawn.std(0)


def plot_nuts_against_guide(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A point for each cell and dimension, with the standard error over chains in both directions.

    A guide that is right lies at a difference of 0 and a ratio of 1.
    """
    axis = plt.subplots()[1] if ax is None else ax
    across, up = (
        of_metric(frame, metric).groupby(["cell", "dim"], sort=False)["value"]
        for metric in ("mean_difference", "sd_ratio")
    )
    for name in dict.fromkeys(frame["cell"]):
        at, errors = (across.mean()[name], up.mean()[name]), (across.sem()[name], up.sem()[name])
        axis.errorbar(*at, xerr=errors[0], yerr=errors[1], fmt="o", markersize=3, label=name)
    axis.axhline(1, color="grey", linewidth=1)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(xlabel="mean of z, NUTS minus guide, in sd by NUTS", ylabel="sd of z, guide / NUTS")
    axis.legend(title="cell", frameon=False)
    return axis


def _start(vae: SCANVAE, cells: Cells) -> dict[str, Tensor]:
    """A draw of the guide for each site of cells that is not enumerated."""
    with torch.no_grad():
        drawn = own_sites(poutine.trace(poutine.enum(vae.guide, -2)).get_trace(cells))
        label_free = own_sites(poutine.trace(vae.guide).get_trace(cells))
    return {
        name: label_free[name]["value"]
        for name, site in drawn.items()
        if in_cells(site) and enumeration_dim(site) is None
    }


def _of_all(statistic: Any, z: Tensor) -> Tensor:
    """Of each cell and dimension over all chains, repeated for each chain."""
    with np.errstate(divide="ignore", invalid="ignore"):  # where no chain moved
        value = statistic(z.double().cpu().numpy(), chain_axis=0, draw_axis=1)
    return torch.as_tensor(np.where(np.isfinite(value), value, np.nan)).expand(z[:, 0].shape)


def _rows(found: Mapping[str, Tensor], seeds: Sequence[int], names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for metric, values in found.items():
        for (chain, cell, dim), value in np.ndenumerate(values.double().cpu().numpy()):
            place = {"seed": seeds[chain], "setting": "guide", "cell": names[cell], "dim": dim}
            rows.append(place | {"metric": metric, "value": float(value)})
    return tidy(rows)


def _chains(seeds: Sequence[int]) -> list[int]:
    seeds = check_seeds(seeds)
    if len(seeds) < 2:
        raise InputError(f"seeds={seeds}, expected two or more: each is a chain")
    return seeds


def _arviz() -> Any:
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise InputError(
            "R-hat and effective sample size need arviz-stats; pip install 'pyro-scanvi[arviz]'"
        ) from error
    return array_stats

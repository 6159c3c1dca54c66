"""Correlation of genes over denoised expression, in memory that grows with genes only."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from torch import Tensor
from torch.distributions import Gamma

from pyro_scanvi.data.minibatches import CellData, ordered_loader
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import LARGEST_PASS, count_parameters, evaluating, passes
from pyro_scanvi.validation import InputError


def denoised(p: CountParameters, size_factor: float, noisy: bool) -> Tensor:
    r"""Expression at a common size, with the Gamma noise of the negative binomial, (..., N, G).

    .. math:: w_g \sim \mathrm{Gamma}(\theta_g,\ \theta_g / (\mathrm{size} \cdot \rho_g))

    which has mean :math:`\mathrm{size} \cdot \rho_g` (Lopez et al. 2018); without noise the mean.
    """
    mean = size_factor * p.rho
    if not noisy:
        return mean
    theta = p.theta.expand_as(mean)
    return mean * Gamma(theta, theta).sample()


def correlation_of_genes(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    correlate: Callable[[Iterable[np.ndarray], int, int], np.ndarray],
    n_samples: int,
    size_factor: float,
    batches: Sequence[int | None],
) -> np.ndarray:
    """Correlation (G, G) over S denoised draws for each cell, averaged over batches.

    Parameters
    ----------
    correlate
        :func:`pearson` or :func:`spearman`.
    n_samples
        Number S of draws.
    size_factor
        Size of every cell.
    batches
        Codes of the batches that all cells are decoded as, one after the other; None is each
        cell's own.
    """

    def blocks(batch: int | None) -> Iterator[np.ndarray]:
        for cells in ordered_loader(data, batch_size):
            cells = cells.to(vae.y_prior.device)
            for n in passes(n_samples, cells.x.numel()):
                p = count_parameters(vae, cells, n, batch)
                sample = denoised(p, size_factor, vae.likelihood.uses_theta)
                yield sample.flatten(0, 1).cpu().numpy()

    with evaluating(vae):
        found = (correlate(blocks(b), n_samples * len(data), vae.n_input) for b in batches)
        return sum(found) / len(batches)


def pearson(blocks: Iterable[np.ndarray], n_rows: int, n_columns: int) -> np.ndarray:
    """Correlation of the columns of blocks of rows; NaN where a column does not vary.

    Means and products about the mean are updated block by block in float64 (Chan, Golub and
    LeVeque 1979), so that nothing cancels where the mean is large.
    """
    n, mean, products = 0, np.zeros(n_columns), np.zeros((n_columns, n_columns))
    for block in blocks:
        block = block.astype(np.float64)
        shift = block.mean(0) - mean
        block -= mean + shift
        products += block.T @ block
        products += np.outer(shift, shift * (n * len(block) / (n + len(block))))
        n += len(block)
        mean += shift * len(block) / n
    spread = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        products /= spread
        products /= spread[:, None]
    return np.clip(products, -1, 1, out=products)


def spearman(blocks: Iterable[np.ndarray], n_rows: int, n_columns: int) -> np.ndarray:
    """Correlation of the ranks of the columns, equal values sharing their mean rank.

    A rank needs a whole column, so that all values go through a temporary file, 4 bytes each.

    Raises
    ------
    InputError
        If the disk of temporary files has no place for them.
    """
    check_disk(n_rows * n_columns * np.dtype(np.float32).itemsize)
    # What is left of a file that Windows still holds open is swept up by the system.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "columns"
        columns = np.memmap(path, np.float32, "w+", shape=(n_columns, n_rows))
        start = 0
        for block in blocks:
            columns[:, start : start + len(block)] = block.T
            start += len(block)
        for column in columns:
            column[:] = rankdata(column)
        step = max(1, LARGEST_PASS // n_columns)
        ranks = (columns[:, i : i + step].T for i in range(0, n_rows, step))
        return pearson(ranks, n_rows, n_columns)


def check_disk(n_bytes: int) -> None:
    """Refuse what the disk of temporary files has no place for; writing there would crash."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise InputError(
            f"ranks need {n_bytes / 2**30:.1f} GiB of disk in {folder}, which has "
            f"{free / 2**30:.1f} GiB left; set TMPDIR to a larger disk, lower n_samples, or take "
            "correlation_type='pearson', which needs none"
        )


CORRELATIONS = {"pearson": pearson, "spearman": spearman}

"""Correlation of genes over denoised expression, in memory that grows with genes only."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import rankdata

from pyro_scanvi.data.minibatches import CellData, ordered_loader
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    LARGEST_PASS,
    Draws,
    at_once,
    batch_codes,
    evaluating,
    passes,
    seeded,
)
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_positive,
    look_up,
    plain_arguments,
)


class Correlation(Trained):
    """The question of which genes go together."""

    @plain_arguments
    def get_feature_correlation_matrix(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 10,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: str | Sequence[str] | None = None,
        correlation_type: str = "spearman",
        *,
        seed: int | None = None,
    ) -> pd.DataFrame:
        r"""Correlation of genes over denoised expression, genes by genes.

        .. math:: w_g \sim \mathrm{Gamma}(\theta_g,\ \theta_g / (\mathrm{size} \cdot \rho_g(z))),
            \qquad z \sim q(z \mid x),

        the negative binomial at one size for all cells, without its Poisson noise and without
        structural zeros. The Poisson has no Gamma noise: :math:`w = \mathrm{size} \cdot \rho(z)`.
        Of a likelihood of one's own counts are drawn, or what its ``denoised`` draws.

        Memory grows with genes squared. Ranks ("spearman") go through a temporary file of
        4 bytes x cells x `n_samples` x genes, and one gene at a time is held in memory.

        Parameters
        ----------
        adata, indices
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        n_samples
            Draws for each cell.
        batch_size
            Cells in a minibatch.
        rna_size_factor
            Size of every cell in counts.
        transform_batch
            Batches to decode every cell as; a name or several, whose matrices are averaged. None
            is the cell's own batch.
        correlation_type
            "spearman" or "pearson".
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        DataFrame
            NaN for genes that do not vary.

        Raises
        ------
        InputError
            For unknown batches or types of correlation, a single draw in all, sizes that are no
            positive numbers, or a disk without place for the temporary file.
        """
        check_at_least(1, n_samples=n_samples, batch_size=batch_size)
        check_positive(rna_size_factor=rna_size_factor)
        correlate = look_up(CORRELATIONS, correlation_type, "correlation_type")
        batches = batch_codes(transform_batch, self.fields.batches)
        data, _ = self.encoded(adata, indices, extra=False)
        if n_samples * len(data) == 1:
            raise InputError("one draw of one cell has no correlation; choose more of either")
        with seeded(seed):
            matrix = correlation_of_genes(
                self.module, data, batch_size, correlate, n_samples, rna_size_factor, batches
            )
        return pd.DataFrame(matrix, index=self.fields.genes, columns=self.fields.genes)


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
                p = Draws(vae, cells, n).decode(batch, library=cells.x.new_tensor(size_factor))
                sample = vae.likelihood.expression_draw(p)
                yield sample.flatten(0, 1).cpu().numpy()

    with evaluating(vae, data):
        found = (correlate(blocks(b), n_samples * len(data), vae.n_input) for b in batches)
        return sum(found, np.zeros(())) / len(batches)


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
        step = at_once(n_columns, LARGEST_PASS)
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

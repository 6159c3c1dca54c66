"""Do cells look like any that labels are known of? Another tissue or shuffled genes do not."""

import warnings

import numpy as np
from scipy.sparse import csr_matrix

from pyro_scanvi.annotation.consensus import Consensus, dense, log_normalised

SMALLEST_LIKENESS = 0.5  # other batches of the same tissue have .8 and more, mixed-up genes .1
ENOUGH_CELLS, ENOUGH_GENES = 20, 100  # of fewer a correlation is noise
CELLS_LOOKED_AT = 2000


def warn_of_strangers(
    consensus: Consensus, counts: csr_matrix | np.ndarray, stacklevel: int
) -> None:
    """Say loudly that cells, counts (N, G), do not look like any that a reference knows.

    The warning names the line that is `stacklevel` calls above.
    """
    n_cells = counts.shape[0]
    chosen = np.linspace(0, n_cells - 1, min(n_cells, CELLS_LOOKED_AT)).astype(int)
    looked_at = dense(counts[chosen])
    if n_cells < ENOUGH_CELLS or (looked_at != 0).any(0).sum() < ENOUGH_GENES:
        return
    found = likeness(consensus, looked_at)
    if found < SMALLEST_LIKENESS:
        warnings.warn(
            f"these cells do not look like those of the reference: their mean profile has a "
            f"correlation of {found:.2f} with that of the most similar label, where other batches "
            "of the same tissue have .8 and more. Their labels will be wrong. Look at the names "
            "and the order of the genes, the species, the tissue, and whether the counts are raw",
            stacklevel=stacklevel + 1,
        )


def likeness(consensus: Consensus, counts: csr_matrix | np.ndarray) -> float:
    """How like the labelled cells others are: correlation over genes of mean log-normalised counts.

    With those of the most similar label, or of all of them, over the genes that the others have:
    some may not have been measured. Near 1 for cells of the same kind, of one type too, and near 0
    where genes were mixed up.
    """
    profile = log_normalised(dense(counts)).mean(0)
    known = np.concatenate([consensus.profiles, consensus.profiles.mean(0, keepdims=True)])
    compared = np.concatenate([profile[None], known])[:, profile > 0]
    with np.errstate(invalid="ignore"):
        found = np.corrcoef(compared)[0, 1:]
    return float(np.nan_to_num(found).max())

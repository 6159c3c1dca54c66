"""The minibatch type, the data set in memory, and the way from one to the other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

UNLABELED = -1
SMALLEST_LIBRARY_VARIANCE = 1e-4


@dataclass(frozen=True)
class Cells:
    """A minibatch of cells: what model, guide and objective see of the data.

    Attributes
    ----------
    x
        Counts, (N, G).
    batch
        Code of the biological batch, (N,).
    label
        Code of the label, (N,); ``UNLABELED`` (-1) where it is not known.
    index
        Position of each cell in the data set that the minibatch was drawn from, (N,).
    n_obs
        Number of cells in that data set.
    continuous, categorical
        Further covariates: values (N, C) and codes (N, D).
    size_factor
        Given size of each cell in counts, (N, 1).
    """

    x: Tensor
    batch: Tensor
    label: Tensor
    index: Tensor
    n_obs: int
    continuous: Tensor | None = None
    categorical: Tensor | None = None
    size_factor: Tensor | None = None

    @classmethod
    def from_counts(cls, x: Tensor, batch=None, label=None, **covariates) -> "Cells":
        """Take `x` (N, G) as the whole data set; one batch and no labels unless given."""
        n_obs = len(x)
        zeros = torch.zeros(n_obs, dtype=torch.long, device=x.device)
        batch = zeros if batch is None else batch
        label = zeros + UNLABELED if label is None else label
        index = torch.arange(n_obs, device=x.device)
        return cls(x, batch, label, index, n_obs, **covariates)

    @property
    def labelled(self) -> Tensor:
        """Whether the label of each cell is known, (N,)."""
        return self.label != UNLABELED

    def hide_labels(self) -> "Cells":
        """The same cells, none of them labelled."""
        return replace(self, label=torch.full_like(self.label, UNLABELED))

    def to(self, *args, **kwargs) -> "Cells":
        """Move every tensor to a device; arguments of :meth:`torch.Tensor.to`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(*args, **kwargs) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class CellData(Dataset):
    """All cells of a data set, as arrays; ``data[positions]`` is a minibatch.

    Counts stay as they are, sparse or dense: only the cells of a minibatch are made dense.

    Attributes
    ----------
    counts
        (N, G), CSR or dense.
    batch, label
        Codes, (N,); label is ``UNLABELED`` where it is not known.
    continuous, categorical, size_factor
        Further covariates, (N, C) and (N, D), and size factors, (N, 1); None where not used.
    """

    counts: csr_matrix | np.ndarray
    batch: np.ndarray
    label: np.ndarray
    continuous: np.ndarray | None = None
    categorical: np.ndarray | None = None
    size_factor: np.ndarray | None = None

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, positions: np.ndarray) -> Cells:
        rows = self.subset(positions)
        counts = rows.counts.toarray() if issparse(rows.counts) else rows.counts
        arrays = {f.name: getattr(rows, f.name) for f in fields(rows) if f.name != "counts"}
        tensors = {k: None if v is None else torch.from_numpy(v) for k, v in arrays.items()}
        x = torch.from_numpy(np.asarray(counts, dtype=np.float32))
        return Cells(x=x, index=torch.as_tensor(positions), n_obs=len(self), **tensors)

    def subset(self, positions: np.ndarray) -> "CellData":
        """The cells at `positions`, as a data set of their own."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return CellData(**{k: None if v is None else v[positions] for k, v in arrays.items()})


class MinibatchSampler(Sampler[np.ndarray]):
    """Positions of each minibatch of an epoch, shuffled, labelled cells spread evenly.

    Minibatches differ by one cell at most in size, so there is no small last one. Labelled cells
    are dealt out evenly, so that few labels still reach every minibatch that they can. The order
    depends on seed and epoch alone.
    """

    def __init__(self, labelled: np.ndarray, batch_size: int, seed: int, first_epoch: int = 0):
        self.labelled = labelled
        self.n_minibatches = -(-len(labelled) // batch_size)
        self.seed = seed
        self.first_epoch = first_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_minibatches

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.first_epoch + self.epoch])
        place = np.empty(len(self.labelled))
        for stratum in (self.labelled, ~self.labelled):
            n = stratum.sum()
            place[stratum] = (rng.permutation(n) + rng.random(n)) / max(n, 1)
        return iter(np.array_split(place.argsort(), self.n_minibatches))


def training_loader(data: CellData, batch_size: int, seed: int, first_epoch: int = 0) -> DataLoader:
    """Shuffled minibatches; see :class:`MinibatchSampler`."""
    return _loader(data, MinibatchSampler(data.label != UNLABELED, batch_size, seed, first_epoch))


def ordered_loader(data: CellData, batch_size: int) -> DataLoader:
    """Minibatches in the order of the data."""
    n_minibatches = max(1, -(-len(data) // batch_size))
    return _loader(data, np.array_split(np.arange(len(data)), n_minibatches))


def _loader(data: CellData, positions: Iterable[np.ndarray]) -> DataLoader:
    # Its own generator: a DataLoader draws from the global one whenever it is iterated.
    return DataLoader(data, sampler=positions, batch_size=None, generator=torch.Generator())


def split(label: np.ndarray, train_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training and for validation, split within each class and the unlabelled.

    The validation share of a class is rounded down, so a class of few labels keeps them all.
    """
    rng = np.random.default_rng(seed)
    validation = []
    for code in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == code))
        validation.append(members[: int(len(members) * (1 - train_size) + 1e-9)])
    held_out = np.sort(np.concatenate(validation))
    return np.setdiff1d(np.arange(len(label)), held_out), held_out


def library_prior(data: CellData, n_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the log total count of the cells of each batch, (n_batch,) each."""
    log_library = np.log(np.asarray(data.counts.sum(axis=1), dtype=float).ravel())
    by_batch = [log_library[data.batch == batch] for batch in range(n_batch)]
    # A batch of equal cells, or of none, still needs a proper prior.
    means = np.array([x.mean() if len(x) else log_library.mean() for x in by_batch])
    variances = np.array([x.var() if len(x) > 1 else log_library.var() for x in by_batch])
    return means, np.maximum(variances, SMALLEST_LIBRARY_VARIANCE)

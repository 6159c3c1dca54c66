"""The minibatch type, the data set in memory, and the way from one to the other."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pyro_scanvi.names import listed
from pyro_scanvi.validation import InputError

Counts: TypeAlias = csr_matrix | np.ndarray

UNLABELED = -1
LOG_IMPOSSIBLE = -1e20  # finite: it is multiplied by probabilities that are 0
SMALLEST_LIBRARY_VARIANCE = 1e-4
CELLS_AT_ONCE = 4096  # in float64


def alone(total: Tensor) -> Tensor:
    """A sum over the cells of all processes where there is one."""
    return total


class Named(dict):
    """Data of cells by name; a name that is not there says why, and what to do.

    Parameters
    ----------
    values
        Arrays or tensors by name.
    unread
        Of names that could not be read, the reason.

    Examples
    --------
    >>> Named(protein=torch.ones(3, 2)).each(len)
    {'protein': 3}
    """

    def __init__(self, values: Any = (), unread: Mapping[str, str] | None = None, **more: Any):
        super().__init__(values, **more)
        self.unread = dict(unread or {})

    def __missing__(self, name: str) -> Any:
        there_are = f"these cells have no extra data {name!r}, only: {listed(self) or 'none'}; "
        mend = "name it in SCANVI.setup_anndata(..., extra={...}), or give Cells(..., extra={...})"
        raise InputError(self.unread.get(name, there_are + mend))

    def each(self, change: Callable[[Any], Any]) -> "Named":
        """The same names, and what `change` makes of each value."""
        return Named({name: change(value) for name, value in self.items()}, self.unread)


@dataclass  # not frozen: Lightning converts the tensors of a minibatch to its precision
class Cells:
    """A minibatch of cells: what model, guide and objective see of the data.

    Attributes
    ----------
    x
        Counts, (N, G).
    batch
        Code of the biological batch, (N,).
    label
        Code of the label, (N,); ``UNLABELED`` (-1) where it is not known exactly.
    index
        Position of each cell in the data set that the minibatch was drawn from, (N,), such as the
        cells to train on.
    n_obs
        Number of cells in that data set.
    continuous, categorical
        Further covariates: values (N, C) and codes (N, D).
    size_factor
        Given size of each cell in counts, (N, 1).
    weight
        Weight of each cell in the objective, (N,); None is 1. A weight of 2 is as if the cell were
        there twice.
    classified
        Whether each cell may count in the classification term, (N,); None is all of them.
    evidence
        log p(what is known of the label | label) of each label, (N, L), where that may be a set of
        labels or a soft label; None where :attr:`label` says all.
    annotations
        Codes of the labels that further annotators gave, (N, A); ``UNLABELED`` where none.
    shared
        Draws of the sites outside the plate, by name; model and guide put them there.
    extra
        Further data of each cell by the name that :meth:`SCANVI.setup_anndata` gave them, (N, D)
        each; a row of NaN where the cell was not measured. InputError for a name that is not there.
    position
        Position of each cell in the AnnData, (N,): ``adata[cells.position]``; `index` unless given.
    pooled
        From a sum over these cells to the sum over the minibatch of all processes, times the share
        that these cells have in it: the denominator of a mean over some of them. It is the sum
        itself where one process trains.
    """

    x: Tensor
    batch: Tensor  # None only where nothing reads it
    label: Tensor
    index: Tensor
    n_obs: int
    continuous: Tensor | None = None
    categorical: Tensor | None = None
    size_factor: Tensor | None = None
    weight: Tensor | None = None
    classified: Tensor | None = None
    evidence: Tensor | None = None
    annotations: Tensor | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Named = field(default_factory=Named)  # any mapping is taken
    position: Tensor = None  # type: ignore[assignment]  # filled in
    pooled: Callable[[Tensor], Tensor] = alone

    def __post_init__(self) -> None:
        if not isinstance(self.extra, Named):
            self.extra = Named(self.extra)
        self.position = self.index if self.position is None else self.position

    @classmethod
    def from_counts(cls, x: Tensor, batch=None, label=None, **covariates) -> "Cells":
        """Take `x` (N, G) as the whole data set; one batch and no labels unless given.

        Others are given by name, such as ``extra={"protein": ...}``.

        Examples
        --------
        >>> cells = Cells.from_counts(torch.ones(3, 5), label=torch.tensor([1, 0, -1]))
        >>> len(cells), cells.labelled.tolist(), cells.batch.tolist()
        (3, [True, True, False], [0, 0, 0])
        """
        n_obs = len(x)
        zeros = torch.zeros(n_obs, dtype=torch.long, device=x.device)
        batch = zeros if batch is None else batch
        label = zeros + UNLABELED if label is None else label
        index = torch.arange(n_obs, device=x.device)
        return cls(x, batch, label, index, n_obs, **covariates)

    @property
    def labelled(self) -> Tensor:
        """Whether the label of each cell is known exactly, (N,)."""
        return self.label != UNLABELED

    def label_evidence(self, n_labels: int) -> Tensor:
        """log p(what is known of the label | label) by each annotator, (1 + A, N, L).

        Zeros where nothing is known; 0 at an exact label and ``LOG_IMPOSSIBLE`` elsewhere.
        """
        first = self.evidence
        if first is None:
            first = exact_evidence(self.label, n_labels, self.x.dtype)
        if self.annotations is None:
            return first.unsqueeze(0)
        further = exact_evidence(self.annotations.T, n_labels, self.x.dtype)
        return torch.cat([first.unsqueeze(0), further])

    def hide_labels(self) -> "Cells":
        """The same cells, nothing known of their labels."""
        hidden = torch.full_like(self.label, UNLABELED)
        return replace(self, label=hidden, evidence=None, annotations=None)

    def to(self, *args, **kwargs) -> "Cells":
        """Move every tensor to a device; arguments of :meth:`torch.Tensor.to`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(*args, **kwargs) for k, v in tensors.items() if isinstance(v, Tensor)
        }
        shared = {k: v.to(*args, **kwargs) for k, v in self.shared.items()}
        extra = self.extra.each(lambda v: v.to(*args, **kwargs))
        return replace(self, **moved, shared=shared, extra=extra)

    def __len__(self) -> int:
        return len(self.x)


def exact_evidence(label: Tensor, n_labels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log probability of an exact label given each label, (..., L); zeros where unlabelled.

    Examples
    --------
    >>> exact_evidence(torch.tensor([1, UNLABELED]), n_labels=2).exp()
    tensor([[0., 1.],
            [1., 1.]])
    """
    other = torch.arange(n_labels, device=label.device) != label.unsqueeze(-1)
    impossible = other & (label != UNLABELED).unsqueeze(-1)
    return impossible * torch.full((), LOG_IMPOSSIBLE, dtype=dtype, device=label.device)


@dataclass(frozen=True)
class Share:
    """The part of each minibatch that one of several processes takes; all of it, unless told.

    Parts differ by one cell at most in size, and spread as evenly over the minibatch.

    Examples
    --------
    >>> [Share(rank, 2).of(np.arange(5)).tolist() for rank in (0, 1)]
    [[0, 2, 4], [1, 3]]
    """

    rank: int = 0
    n: int = 1

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Its positions of those of a minibatch."""
        return positions[self.rank :: self.n]


WHOLE = Share()


@dataclass(frozen=True)
class CellData(Dataset):
    """All cells of a data set, as arrays; ``data[positions]`` is a minibatch.

    Counts stay as they are, sparse or dense: only the cells of a minibatch are made dense. Nothing
    is shared with an AnnData, which its user goes on to change.

    Attributes
    ----------
    counts
        (N, G), CSR or dense.
    batch, label
        Codes, (N,); label is ``UNLABELED`` where it is not known.
    continuous, categorical, size_factor
        Further covariates, (N, C) and (N, D), and size factors, (N, 1); None where not used.
    weight
        Weight of each cell in the objective, (N,); None is 1.
    evidence, annotations
        As in :class:`Cells`, (N, L) and (N, A); None where labels are exact and of one annotator.
    extra
        Further data by name, (N, D) each, float32, CSR or dense; a row of NaN is not measured.
    position
        Position of each cell in the AnnData, (N,); None is their own order.
    """

    counts: Counts
    batch: np.ndarray  # None only where nothing reads it
    label: np.ndarray
    continuous: np.ndarray | None = None
    categorical: np.ndarray | None = None
    size_factor: np.ndarray | None = None
    weight: np.ndarray | None = None
    evidence: np.ndarray | None = None
    annotations: np.ndarray | None = None
    extra: Named = field(default_factory=Named)
    position: np.ndarray | None = None

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, positions: np.ndarray) -> Cells:
        rows = self.subset(positions)
        arrays = {name: getattr(rows, name) for name in self._columns()}
        tensors: dict[str, Any] = {
            k: None if v is None else torch.from_numpy(v) for k, v in arrays.items()
        }
        return Cells(
            x=_dense(rows.counts),
            index=torch.as_tensor(positions),
            n_obs=len(self),
            extra=rows.extra.each(_dense),
            **tensors,
        )

    def equals(self, other: "CellData") -> bool:
        """Whether all arrays are the same; sparse and dense counts differ."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in self._columns()]
        pairs.append((self.counts, other.counts))
        if self.extra.keys() != other.extra.keys():
            return False
        pairs += [(_marked(v), _marked(other.extra[name])) for name, v in self.extra.items()]
        return all(itertools.starmap(_same, pairs))

    def subset(self, positions: np.ndarray) -> "CellData":
        """The cells at `positions`, as a data set of their own."""
        arrays = {name: getattr(self, name) for name in self._columns()}
        chosen: dict[str, Any] = {k: v if v is None else v[positions] for k, v in arrays.items()}
        if self.position is None:
            chosen["position"] = np.arange(len(self))[positions]
        extra = self.extra.each(lambda v: v[positions])
        return replace(self, counts=self.counts[positions], extra=extra, **chosen)

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        first_epoch: int = 0,
        balanced: bool = False,
        share: Share = WHOLE,
    ) -> "MinibatchSampler":
        """Minibatches to train on; see :class:`MinibatchSampler`."""
        return MinibatchSampler(self.label, batch_size, seed, first_epoch, balanced, share)

    def in_order(self, batch_size: int, share: Share = WHOLE) -> Iterable[np.ndarray]:
        """Minibatches in the order of the data; of each the part of one process."""
        n_minibatches = max(1, -(-len(self) // (batch_size * share.n)))
        return [share.of(p) for p in np.array_split(np.arange(len(self)), n_minibatches)]

    def check_in_memory(self, what: str, instead: str) -> None:
        """Refuse `what` where the counts are not in memory, and say what to do instead."""

    def _columns(self) -> list[str]:
        """Fields that hold an array, or None."""
        return [f.name for f in fields(self) if f.name not in ("counts", "extra")]


def _dense(matrix: Counts) -> Tensor:
    dense = matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
    return torch.from_numpy(np.asarray(dense, dtype=np.float32))


def _marked(matrix: Counts) -> Counts:
    """The same matrix with infinity, which is nowhere else, where it is not measured (NaN)."""
    if isinstance(matrix, np.ndarray):
        return np.nan_to_num(matrix, nan=np.inf)
    values = np.nan_to_num(matrix.data, nan=np.inf)
    return csr_matrix((values, matrix.indices, matrix.indptr), matrix.shape)


def _same(one: Any, other: Any) -> bool:
    """Whether two matrices or arrays are the same; None is None."""
    if issparse(one) and issparse(other):
        return one.shape == other.shape and (one != other).nnz == 0
    return type(one) is type(other) and np.array_equal(one, other)


class MinibatchSampler(Sampler[np.ndarray]):
    """Positions of each minibatch of an epoch, shuffled, labelled cells spread evenly.

    Minibatches differ by one cell at most in size, so there is no small last one. Labelled cells
    are dealt out evenly, so that few labels still reach every minibatch that they can. The order
    depends on seed and epoch alone.

    Parameters
    ----------
    label
        Code of each cell, ``UNLABELED`` where it is not known.
    batch_size
        Most cells in a minibatch.
    seed, first_epoch
        Epoch e is shuffled by `seed` and `first_epoch` + e.
    balanced
        Draw the labelled cells of each epoch so that every label is seen equally often.
    share
        Of several processes the part of this one: all deal the same minibatches, of `batch_size`
        cells for each process, and each takes its share of every one.
    """

    def __init__(
        self,
        label: np.ndarray,
        batch_size: int,
        seed: int,
        first_epoch: int = 0,
        balanced: bool = False,
        share: Share = WHOLE,
    ):
        self.label = label
        self.share = share
        self.n_minibatches = -(-len(label) // (batch_size * share.n))
        self.seed = seed
        self.first_epoch = first_epoch
        self.balanced = balanced
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_minibatches

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.first_epoch + self.epoch])
        labelled = np.flatnonzero(self.label != UNLABELED)
        if self.balanced:
            labelled = balanced_draw(self.label, rng)
        strata = labelled, np.flatnonzero(self.label == UNLABELED)
        place = [(self.ranks(s, rng) + rng.random(len(s))) / max(len(s), 1) for s in strata]
        order = np.concatenate(strata)[np.concatenate(place).argsort()]
        return map(self.share.of, np.array_split(order, self.n_minibatches))

    def ranks(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Place of each of these cells among them in the order of the epoch, (n,)."""
        return rng.permutation(len(cells))


def balanced_draw(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many positions as there are labelled cells, equally many of each label.

    Cells of a rare label come several times, each equally often but for one.
    """
    classes = rng.permutation(np.unique(label[label != UNLABELED]))
    total = int((label != UNLABELED).sum())
    drawn = [np.empty(0, dtype=int)]
    for rank, code in enumerate(classes):
        members = np.flatnonzero(label == code)
        share = total // len(classes) + (rank < total % len(classes))
        whole, rest = divmod(share, len(members))
        drawn += [np.tile(members, whole), rng.choice(members, rest, replace=False)]
    return np.concatenate(drawn)


def subsampled_labels(label: np.ndarray, n_per_label: int, rng: np.random.Generator) -> np.ndarray:
    """At most so many cells of each label, drawn without replacement, as a mask (N,).

    Cells without an exact label are all in it.
    """
    chosen = label == UNLABELED
    for code in np.unique(label[label != UNLABELED]):
        chosen[rng.permutation(np.flatnonzero(label == code))[:n_per_label]] = True
    return chosen


def training_loader(
    data: CellData,
    batch_size: int,
    seed: int,
    first_epoch: int = 0,
    balanced: bool = False,
    share: Share = WHOLE,
) -> DataLoader:
    """Shuffled minibatches; see :class:`MinibatchSampler`."""
    return _loader(data, data.shuffled(batch_size, seed, first_epoch, balanced, share))


def ordered_loader(data: CellData, batch_size: int, share: Share = WHOLE) -> DataLoader:
    """Minibatches in the order of the data."""
    return _loader(data, data.in_order(batch_size, share))


def _loader(data: CellData, positions: Iterable[np.ndarray]) -> DataLoader:
    # Its own generator: a DataLoader draws from the global one whenever it is iterated.
    return DataLoader(data, sampler=positions, batch_size=None, generator=torch.Generator())


def split(
    label: np.ndarray, train_size: float, seed: int, validation_size: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training and for validation, split within each class and the unlabelled.

    The shares of a class that are not trained on are rounded down, so a class of few labels keeps
    them all. What neither share takes is left out.
    """
    rng = np.random.default_rng(seed)
    if validation_size is None:
        validation_size = 1 - train_size
    validation, unused = [], []
    for code in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == code))
        n_held = int(len(members) * validation_size + 1e-9)
        n_left = int(len(members) * (1 - train_size - validation_size) + 1e-9)
        validation.append(members[:n_held])
        unused.append(members[n_held : n_held + n_left])
    held_out = np.sort(np.concatenate(validation))
    return np.setdiff1d(np.arange(len(label)), np.concatenate([held_out, *unused])), held_out


def total_counts(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Total count of each cell, (N,), and of each gene, (G,), summed in float64."""
    of_cells, of_genes = np.zeros(counts.shape[0]), np.zeros(counts.shape[1])
    for start in range(0, len(of_cells), CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        x = counts[rows].astype(np.float64)  # scipy sums in the matrix's own type, asked or not
        of_cells[rows] = np.asarray(x.sum(1)).ravel()
        of_genes += np.asarray(x.sum(0)).ravel()
    return of_cells, of_genes


def library_prior(data: CellData, n_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the log total count of the cells of each batch, (n_batch,) each."""
    log_library = np.log(total_counts(data.counts)[0])
    by_batch = [log_library[data.batch == batch] for batch in range(n_batch)]
    # A batch of equal cells, or of none, still needs a proper prior.
    means = np.array([x.mean() if len(x) else log_library.mean() for x in by_batch])
    variances = np.array([x.var() if len(x) > 1 else log_library.var() for x in by_batch])
    return means, np.maximum(variances, SMALLEST_LIBRARY_VARIANCE)

r"""What annotators make of a label: p(given label | label), the part that reads label evidence.

What is known of a cell's label is evidence :math:`\log p(e \mid y)`: of an exact label k it is 0 at
k and -inf elsewhere, of a set 0 at its members, of a soft label the logarithm of its
probabilities. An annotator a who errs gives label k with probability :math:`C^a_{yk}`, so that

.. math:: \log p(e \mid y) = \sum_a \log \sum_k C^a_{yk}\, p(e^a \mid k).

Natarajan et al. (2013), NeurIPS (class-conditional noise); Patrini et al. (2017), CVPR (the forward
correction); Dawid and Skene (1979), Appl Stat 28:20 (annotators with a confusion matrix each).
``LABEL_NOISE`` is the only table from names to such parts.

One annotator's matrix and a classifier that may be unsure explain the same labels (the matrix is
the identity, the classifier as unsure as the labels are noisy), or the classifier knows the wrong
labels by heart. So a rate of one annotator is no estimate: it moves little from where it starts,
and towards 1 the longer it is trained. Where the matrix is known, give it (:class:`FixedNoise`).
Three annotators tell theirs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import Dirichlet, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import LOG_IMPOSSIBLE
from pyro_scanvi.validation import InputError

START = 0.7  # how often an annotator is right, before anything is learned
SITE = "confusion"


@dataclass(frozen=True)
class LabelSizes:
    """Numbers of labels and annotators that label noise is made from."""

    n_labels: int
    n_annotators: int = 1


class LabelNoise(nn.Module, ABC):
    """From the evidence that annotators give to that of the label itself.

    Attributes
    ----------
    is_matrix
        Whether its tensors have labels on two axes, which a query's new labels cannot enlarge.
    is_exact
        Whether a given label is the label.
    """

    is_matrix: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False

    @abstractmethod
    def forward(self, given: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Evidence about the given label of each annotator to that about the label.

        Parameters
        ----------
        given
            log p(what is known | given label), (A, N, L).
        shared
            Draws of what all cells share.

        Returns
        -------
        Tensor
            log p(what is known | label), (N, L), or (S, N, L) where the shared draws are S.
        """

    def p_shared(self) -> dict[str, TorchDistribution]:
        """p of sites outside the plate of cells; none here."""
        return {}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """q of the same sites."""
        return {}


class NoNoise(LabelNoise):
    """Annotators are right, so that what they say adds up."""

    is_exact: ClassVar[bool] = True

    def __init__(self, sizes: LabelSizes):
        super().__init__()
        if sizes.n_annotators > 1:
            raise InputError(
                f"{sizes.n_annotators} annotators are given, and label_noise='none' takes each for "
                "right, where they may contradict each other; choose label_noise='rate', "
                "'learned', 'dirichlet' or a part of your own"
            )

    def forward(self, given: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The evidence as it is."""
        return given.sum(0)


class ConfusionNoise(LabelNoise):
    """Annotators with a confusion matrix each; a subclass says where it comes from."""

    @abstractmethod
    def confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """C, (..., A, L, L): the row of a label says how often which label is given for it."""

    def forward(self, given: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Sum over annotators of log C e, where they say anything."""
        confusion = self.confusion(shared)
        if confusion.ndim > 3:  # draws, and a dimension in the place of the cells
            confusion = confusion.squeeze(-4)
        likelihood = given.exp() @ confusion.mT  # ..., A, N, L
        informative = (given != 0).any(-1, keepdim=True)
        return torch.where(informative, safe_log(likelihood), 0.0).sum(-3)


class FixedNoise(ConfusionNoise):
    """Known confusion matrices.

    Parameters
    ----------
    sizes
        Numbers of labels and annotators.
    matrix
        Rows that sum to 1, (L, L) for all annotators or (A, L, L).
    """

    is_matrix: ClassVar[bool] = True
    matrix: Tensor

    def __init__(self, sizes: LabelSizes, matrix: Tensor | Sequence):
        super().__init__()
        checked = checked_confusion(matrix, sizes)
        self.register_buffer("matrix", checked)

    def confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """The matrices as they are given."""
        return self.matrix


class RateNoise(ConfusionNoise):
    """Each annotator errs at a rate that is learned, to every other label alike."""

    def __init__(self, sizes: LabelSizes, start: float = START):
        super().__init__()
        self.n_labels = sizes.n_labels
        right = torch.full((sizes.n_annotators,), start)
        self.right_logit = nn.Parameter(right.logit())

    def confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """(A, L, L): the rate of being right on the diagonal, the rest spread evenly."""
        return diagonal_confusion(self.right_logit.sigmoid(), self.n_labels)


class LearnedNoise(ConfusionNoise):
    """Confusion matrices that are learned as parameters."""

    is_matrix: ClassVar[bool] = True

    def __init__(self, sizes: LabelSizes, start: float = START):
        super().__init__()
        right = torch.full((sizes.n_annotators,), start)
        self.logits = nn.Parameter(diagonal_confusion(right, sizes.n_labels).log())

    def confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """(A, L, L)."""
        return self.logits.softmax(-1)


class DirichletNoise(ConfusionNoise):
    r"""Confusion matrices with a posterior: a global site, :math:`C^a_y \sim \mathrm{Dirichlet}`.

    Parameters
    ----------
    sizes
        Numbers of labels and annotators.
    right, others
        Prior counts of the right label, and of all the others together.
    """

    is_matrix: ClassVar[bool] = True
    prior: Tensor

    def __init__(self, sizes: LabelSizes, right: float = 7.0, others: float = 3.0):
        super().__init__()
        rate = torch.full((sizes.n_annotators,), right / (right + others))
        prior = diagonal_confusion(rate, sizes.n_labels) * (right + others)
        self.register_buffer("prior", prior)
        self.log_concentration = nn.Parameter(prior.log())

    def p_shared(self) -> dict[str, TorchDistribution]:
        """Dirichlet rows, (A, L) of them."""
        return {SITE: Dirichlet(self.prior).to_event(2)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """Dirichlet rows, learned."""
        return {SITE: Dirichlet(self.log_concentration.exp()).to_event(2)}

    def confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """The draw."""
        return shared[SITE]


LABEL_NOISE: dict[str, Callable[[LabelSizes], LabelNoise]] = {
    "none": NoNoise,
    "rate": RateNoise,
    "learned": LearnedNoise,
    "dirichlet": DirichletNoise,
}


def diagonal_confusion(right: Tensor, n_labels: int) -> Tensor:
    """Confusion matrices (A, L, L) of annotators who are right so often, (A,)."""
    eye = torch.eye(n_labels, dtype=right.dtype, device=right.device)
    right = right[:, None, None]
    return right * eye + (1 - right) / (n_labels - 1) * (1 - eye)


def checked_confusion(matrix: Tensor | Sequence, sizes: LabelSizes) -> Tensor:
    """Confusion matrices as (A, L, L); InputError if they are none."""
    found = torch.as_tensor(matrix, dtype=torch.get_default_dtype())
    shape = (sizes.n_annotators, sizes.n_labels, sizes.n_labels)
    if tuple(found.shape) not in (shape, shape[1:]):
        raise InputError(
            f"the confusion matrix has shape {tuple(found.shape)}, expected {shape[1:]}: a row for "
            f"each label and a column for each label that may be given; or {shape}"
        )
    sums = found.sum(-1)
    if (found < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise InputError("rows of a confusion matrix are probabilities and sum to 1")
    return found.expand(shape).clone()


def safe_log(p: Tensor) -> Tensor:
    """log p, and ``LOG_IMPOSSIBLE`` of 0; its gradient is finite."""
    positive = p > 0
    return torch.where(positive, torch.where(positive, p, 1.0).log(), LOG_IMPOSSIBLE)

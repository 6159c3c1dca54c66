"""The label of a cell as a distribution, quick where labels are enumerated.

Pyro enumerates L labels of N cells as a value (L, 1, L). What is multiplied with it, or gathered at
it, would take L N L numbers, or their gradient would; what is at a label is chosen here instead.
"""

from pyro.distributions import OneHotCategorical
from torch import Tensor
from torch.nn.functional import one_hot


class LabelCategorical(OneHotCategorical):
    """Pyro's own, with a log probability whose cost grows as L N where labels are enumerated.

    Examples
    --------
    >>> import torch
    >>> p = LabelCategorical(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]))
    >>> p.log_prob(p.enumerate_support(expand=False)).exp()
    tensor([[0.9000, 0.5000, 0.2000],
            [0.1000, 0.5000, 0.8000]])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(y), (..., N), of one-hot y (..., N, L)."""
        if not same_for_all_cells(value, self.logits):
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        return at_label(value, self.logits)


class CertainLabel(LabelCategorical):
    """A label of each cell that is certain; enumerated, it has that value alone.

    Enumerating all labels would decode each cell for those too that have no probability.

    Examples
    --------
    >>> import torch
    >>> known = CertainLabel(logits=torch.tensor([[0.0, -1e20, -1e20], [-1e20, -1e20, 0.0]]))
    >>> known.enumerate_support()
    tensor([[[1., 0., 0.],
             [0., 0., 1.]]])
    """

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The value of each cell, (1, ..., N, L)."""
        n_labels = self.logits.shape[-1]
        return one_hot(self.logits.argmax(-1), n_labels).to(self.logits.dtype).unsqueeze(0)


def at_label(y: Tensor, values: Tensor) -> Tensor:
    """What `values` (..., N, L) are at the labels y, one-hot (..., N, L): (..., N).

    Examples
    --------
    >>> import torch
    >>> values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> at_label(torch.eye(2).unsqueeze(1), values)
    tensor([[1., 3., 5.],
            [2., 4., 6.]])
    """
    if not same_for_all_cells(y, values):
        return (y * values).sum(-1)
    label = y.argmax(-1)
    chosen = values.index_select(-1, label.flatten()).movedim(-1, 0)
    between = label.dim() - chosen.dim()  # dimensions that only y has, of particles
    return chosen.reshape(len(label), *[1] * between, *chosen.shape[1:])


def same_for_all_cells(y: Tensor, values: Tensor) -> bool:
    """Whether y differs in its first dimension alone, which `values` lack, as Pyro enumerates."""
    return y.dim() > max(values.dim(), 2) and y.shape[:-1].numel() == len(y)

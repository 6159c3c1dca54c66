r"""Frequencies of the labels, p(y), that are learned; the default's are given and fixed.

What the frequencies are learned from: a cell whose label is known (and fed, ``feed_labels``) counts
for its label, every other cell for q(y | z). So they come to be those of all cells trained on.
Where the labels were given to cells of the data themselves, by whatever choice (ten of each type),
that is right: labelled and unlabelled together are the sample. Where labelled cells were added from
elsewhere, such as a reference of ten cells of each type, they are no sample of the tissue and pull
the frequencies towards their own: then ``labelled_teach=False`` leaves it to the others. Cells that
are drawn to be balanced in training (``balanced``) or taken a few of each label at a time
(``n_samples_per_label``) are no sample either. Frequencies rest on q(y | z) for most cells, and so
are as right as the classifier is.
"""

from typing import Any

import torch
from pyro.distributions import Dirichlet, Normal, OneHotCategorical, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.extensions.global_sites import without_cells
from pyro_scanvi.model.growth import ByBatch, ByLabel, EachOf, grown_label_prior, grows
from pyro_scanvi.model.scanvae import SCANVAE

PACE = 10.0  # a few frequencies may move faster than networks: so many times the learning rate
START_CELLS = 1000.0  # that the posterior of pi starts from; of few its draws would be noisy
START_SCALE = 0.1  # of the posterior of a batch's shift, as a share of its prior's


class LearnedFrequencies(SCANVAE):
    r"""p(y) = Categorical(pi) with pi learned, starting at `y_prior`.

    Parameters
    ----------
    labelled_teach
        Whether cells of a known label teach pi too: True where they belong to the sample, False
        where they were added to it; see :mod:`pyro_scanvi.extensions.label_priors`.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.
    """

    def __init__(self, *args: Any, labelled_teach: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_flags(labelled_teach=labelled_teach)
        self.labelled_teach = labelled_teach
        self.pi_logits = nn.Parameter(self.y_prior.log() / PACE)
        grows(self, pi_logits=ByLabel(dim=0, start=logits_with_new_labels))

    @property
    def frequencies(self) -> Tensor:
        """pi, (L,)."""
        return (PACE * self.pi_logits).softmax(-1)

    def p_y(self, cells: Cells) -> TorchDistribution:
        """Categorical(pi); batch () or (N,), event (L,)."""
        return OneHotCategorical(taught(self.frequencies, cells, self.labelled_teach))


class DirichletFrequencies(SCANVAE):
    r"""pi with a prior and a posterior: a site ``pi`` that all cells share.

    .. math:: \pi \sim \mathrm{Dirichlet}(\alpha L \pi_0), \quad
        q(\pi) = \mathrm{Dirichlet}(t\, m), \quad y \sim \mathrm{Categorical}(\pi)

    with :math:`\pi_0` the argument `y_prior`, 1 / L each unless given, so that every label has
    :math:`\alpha` prior cells. Mean m and total t are learned. With all labels known the posterior
    is :math:`\alpha L \pi_0 + n`, n the number of cells of each label.

    Parameters
    ----------
    concentration
        :math:`\alpha`, prior cells of each label.
    labelled_teach
        As for :class:`LearnedFrequencies`.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        For a concentration that is not above 0.
    """

    def __init__(
        self,
        *args: Any,
        concentration: float = 1.0,
        labelled_teach: bool = True,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        validation.check_positive(concentration=concentration)
        validation.check_flags(labelled_teach=labelled_teach)
        self.concentration, self.labelled_teach = concentration, labelled_teach
        self.pi_logits = nn.Parameter(self.y_prior.log() / PACE)
        total = torch.tensor(concentration * self.n_labels + START_CELLS)
        self.pi_log_total = nn.Parameter(total.log() / PACE)
        grows(self, pi_logits=ByLabel(dim=0, start=logits_with_new_labels))

    @property
    def frequencies(self) -> Tensor:
        """The mean of q(pi), (L,)."""
        return (PACE * self.pi_logits).softmax(-1)

    def p_shared(self) -> dict[str, TorchDistribution]:
        """The prior of pi, beside what else is shared."""
        prior = self.concentration * self.n_labels * self.y_prior
        return super().p_shared() | {"pi": Dirichlet(prior)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """The posterior of pi, beside what else is shared."""
        total = (PACE * self.pi_log_total).exp()
        return super().q_shared() | {"pi": Dirichlet(total * self.frequencies)}

    def p_y(self, cells: Cells) -> TorchDistribution:
        """Categorical(pi); batch () or (..., N), event (L,)."""
        return OneHotCategorical(taught(cells.shared["pi"], cells, self.labelled_teach))


class FrequenciesOfBatch(LearnedFrequencies):
    r"""pi of each biological batch s, pulled towards that of all.

    .. math:: \pi_s = \mathrm{softmax}(\log \pi + d_s), \quad d_{sy} \sim \mathcal N(0, \tau^2),
        \quad q(d_{sy}) = \mathcal N(m_{sy}, v_{sy})

    A batch of few cells keeps to pi, one of many goes where its cells are; a batch that comes with
    a query starts at the mean of the others. d is the site ``batch_shift``, (B, L), that all cells
    share; pi is learned.

    Parameters
    ----------
    spread
        :math:`\tau`, in log units: at 1, two thirds of the batches have a label up to e times as
        often, or as rarely, as all.
    *args, **kwargs
        As for :class:`LearnedFrequencies`.

    Raises
    ------
    InputError
        For a spread that is not above 0.
    """

    def __init__(self, *args: Any, spread: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_positive(spread=spread)
        self.spread = spread
        shape = self.n_batch, self.n_labels
        self.shift_mean = nn.Parameter(torch.zeros(shape))
        self.shift_log_scale = nn.Parameter(torch.full(shape, START_SCALE * spread).log())
        rule = EachOf(ByBatch(dim=0), ByLabel(dim=1))
        grows(self, shift_mean=rule, shift_log_scale=rule)

    @property
    def frequencies(self) -> Tensor:
        """pi of each batch at the mean of its shift, (B, L)."""
        return (PACE * (self.pi_logits + self.shift_mean)).softmax(-1)

    def p_shared(self) -> dict[str, TorchDistribution]:
        """The prior of the shifts, beside what else is shared."""
        zeros = torch.zeros_like(self.shift_mean)
        return super().p_shared() | {"batch_shift": Normal(zeros, self.spread).to_event(2)}

    def q_shared(self) -> dict[str, TorchDistribution]:
        """The posterior of the shifts, beside what else is shared."""
        posterior = Normal(PACE * self.shift_mean, self.shift_log_scale.exp()).to_event(2)
        return super().q_shared() | {"batch_shift": posterior}

    def p_y(self, cells: Cells) -> TorchDistribution:
        """Categorical(pi_s); batch (..., N) event (L,)."""
        shift = without_cells(cells.shared["batch_shift"][..., cells.batch, :], 2)
        pi = (PACE * self.pi_logits + shift).softmax(-1)
        return OneHotCategorical(taught(pi, cells, self.labelled_teach))


def taught(frequencies: Tensor, cells: Cells, by_labelled: bool) -> Tensor:
    """The same frequencies, without a gradient from the cells that do not teach them.

    (L,) or (..., 1 or N, L); where cells differ (..., N, L).
    """
    if by_labelled:
        return frequencies
    return torch.where(cells.labelled.unsqueeze(-1), frequencies.detach(), frequencies)


def logits_with_new_labels(old: Tensor, own: Tensor) -> Tensor:
    """A start: a new label gets 1 / L', and the old ones keep their ratios."""
    return grown_label_prior((PACE * old).softmax(-1), len(own)).log() / PACE

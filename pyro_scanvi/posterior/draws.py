"""What all questions share: draws from the guide, decoding, minibatches, seeds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyro_scanvi.data.minibatches import CellData, Cells, ordered_loader
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.pyro_internals import (
    Site,
    element_log_prob,
    elements,
    in_cells,
    is_plate,
    samples,
    sites,
)
from pyro_scanvi.model.scanvae import SCANVAE, evaluated
from pyro_scanvi.names import listed
from pyro_scanvi.threads import as_told
from pyro_scanvi.validation import InputError, check_at_least, check_seed, positions_of

EVALUATION_BATCH_SIZE = 512
PLATES = ("cells", "draws")
READ = ("z", "y", "u", "l")  # sites that count parameters are a function of
LARGEST_PASS = 2**22  # numbers in a tensor of samples: 16 MB, large enough to keep a core busy


class Draws:
    """S draws of the guide for each cell, labels by what is known of them.

    Attributes
    ----------
    cells
        The cells, with the draws of what all of them share.
    z, y, library
        (S, N, K), one-hot (S, N, L), and (S, N, 1) or (N, 1).
    """

    def __init__(self, vae: SCANVAE, cells: Cells, n_samples: int):
        self.vae, self.n_samples = vae, n_samples
        with self._plate():
            self.guide = poutine.trace(vae.guide).get_trace(cells)
        drawn = samples(self.guide)
        shared = {name: drawn[name] for name in vae.q_shared()}
        self.cells = replace(cells, shared=shared)
        self.z, self.y = drawn["z"], drawn["y"]
        library = vae.observed_library(cells)
        self.library = drawn["l"] if library is None else library
        for value in (self.z, self.library):
            check_finite(value, cells, dim=-2)

    def decode(self, batch: int | None = None, library: Tensor | None = None) -> CountParameters:
        """rho, mu, theta and gate logits, (S, N, G); of another batch or size if asked.

        Raises
        ------
        InputError
            If the guide draws more than z, y, u, l and what is shared: they are not read here.
        """
        self._check_read()
        cells = as_of_batch(self.cells, batch)
        library = self.library if library is None else library
        return self.vae.count_parameters(self.z, library, self.y, cells)

    def replay(self, batch: int | None = None) -> dict[str, Site]:
        """The sites of the model at these draws; of cells of another batch if asked."""
        model = poutine.replay(self.vae.model, trace=self.guide)
        with self._plate():
            return sites(poutine.trace(model).get_trace(as_of_batch(self.cells, batch)))

    @contextmanager
    def _plate(self) -> Iterator[None]:
        # What the networks give is checked in training; here it would cost a third of the time.
        with pyro.validation_enabled(False), pyro.plate("draws", self.n_samples, dim=-2):
            yield

    def _check_read(self) -> None:
        unread = samples(self.guide).keys() - {*READ, *PLATES, *self.cells.shared}
        if unread:
            raise InputError(
                f"expression is decoded from {', '.join(READ)} and shared sites, but the guide "
                f"draws {', '.join(sorted(unread))} too; ask for the model's own site, by "
                "posterior_predictive_sample or get_likelihood_parameters"
            )


def observed_sites(model: Mapping[str, Site]) -> dict[str, Site]:
    """What is seen of cells: observed sites with numbers; what is known of labels is none."""
    return {
        name: site
        for name, site in model.items()
        if site["type"] == "sample"
        and not is_plate(site)
        and site["is_observed"]
        and in_cells(site)
        and site["value"].numel()
    }


def batch_codes(names: str | Sequence[str] | None, batches: Iterable) -> list[int | None]:
    """Codes of the batches to decode cells as, a name or several; None is the cell's own."""
    return [None] if names is None else [*positions_of(names, batches, "transform_batch")]


def as_of_batch(cells: Cells, batch: int | None) -> Cells:
    """The same cells, all of them of one batch; None leaves each its own."""
    return cells if batch is None else replace(cells, batch=torch.full_like(cells.batch, batch))


def over_minibatches(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    ask: Callable[[Cells], Tensor],
    dim: int = 0,
) -> np.ndarray:
    """What `ask` answers for each minibatch, joined along the cells' dimension `dim`.

    The cells come with what all of them share at the mean of its posterior; Draws draws it anew.
    The answers are written into their place: at no time is there a second copy of the result.

    Raises
    ------
    InputError
        For an answer that is NaN or infinite; see :func:`check_finite`.
    """
    device = vae.y_prior.device
    result, start = np.empty(0), 0
    with evaluating(vae, data):
        for cells in ordered_loader(data, batch_size):
            cells = vae.at_shared_points(cells.to(device))
            found = ask(cells)
            check_finite(found, cells, dim)
            answer = np.moveaxis(found.cpu().numpy(), dim, 0)
            if start == 0:
                result = np.empty((len(data), *answer.shape[1:]), dtype=answer.dtype)
            result[start : start + len(answer)] = answer
            start += len(answer)
    return np.moveaxis(result, 0, dim)


def check_finite(answer: Tensor, cells: Cells, dim: int) -> None:
    """Refuse NaN and infinity along the cells' dimension `dim`; a log probability may be -inf."""
    if bool((answer < torch.inf).all()):
        return
    bad = ~(answer < torch.inf).movedim(dim, 0).reshape(len(cells), -1).all(1).cpu()
    where = cells.position.cpu()[bad].tolist()
    raise InputError(
        f"the model has no finite answer for {len(where)} of {len(cells)} cells, at positions "
        f"{listed(where)}: their counts or covariates take its networks out of the numbers of "
        "float32. Look at these cells, or leave them out; where they are as they should be, train "
        "with log_variational=True, with batch norm, with a smaller lr or with gradient_clip_norm "
        "(both in plan_kwargs)"
    )


def passes(n_samples: int, size: int) -> list[int]:
    """Numbers of samples that sum to `n_samples`, of `size` numbers each, for bounded memory."""
    return parts(n_samples, at_once(size, LARGEST_PASS))


def at_once(size: int, budget: int) -> int:
    """How many things of `size` numbers each stay within a budget of numbers; one at least."""
    return max(1, budget // size)


def parts(n: int, most: int) -> list[int]:
    """Numbers that sum to `n`, all of them `most` but the last."""
    return [min(most, n - start) for start in range(0, n, most)]


def mean_over_samples(n_samples: int, size: int, ask: Callable[[int], Tensor]) -> Tensor:
    """Mean over the first dimension of what `ask` answers, S samples of `size` numbers each."""
    return total(ask(n).sum(0) for n in passes(n_samples, size)) / n_samples


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; of none it is 0."""
    return sum(tensors, torch.zeros(()))


def log_prob_of_events(distribution: Distribution, value: Tensor) -> Tensor:
    """Log probability of events, summed over their dimensions in float64."""
    event_dims = len(distribution.event_shape) - len(elements(distribution)[0].event_shape)
    log_prob = element_log_prob(distribution, value)
    if not event_dims:
        return log_prob.double()
    return log_prob.sum(tuple(range(-event_dims, 0)), dtype=torch.float64)


def minibatch_size(batch_size: int | None) -> int:
    """The size that was asked for, or the default."""
    if batch_size is None:
        return EVALUATION_BATCH_SIZE
    check_at_least(1, batch_size=batch_size)
    return batch_size


def check_weights(weights: str | None) -> None:
    """Refuse weights of draws that are not uniform."""
    if weights not in ("uniform", None):
        raise InputError(
            f"weights={weights!r} is not supported, only 'uniform': the importance weights of "
            "scvi-tools take N(0, I) for the prior of z, which is not that of scANVI"
        )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws of their own, the same for each seed; None draws on from torch's generator."""
    if seed is None:
        yield
        return
    check_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(vae: SCANVAE, data: CellData | None = None) -> Iterator[None]:
    """Without gradients, in eval mode and on the threads that torch was told; all is restored.

    Raises
    ------
    InputError
        Where a cell of `data` has a state that is NaN or infinite, in place of what torch says of
        the numbers that came of it.
    """
    with evaluated(vae), torch.no_grad(), as_told():
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if data is not None and not isinstance(error, InputError):
                _check_states(vae, data)
            raise


def _check_states(vae: SCANVAE, data: CellData) -> None:
    """Refuse cells whose state no question can be answered at."""
    with pyro.validation_enabled(False):
        for cells in ordered_loader(data, EVALUATION_BATCH_SIZE):
            cells = vae.at_shared_points(cells.to(vae.y_prior.device))
            check_finite(vae.latent_point(vae.q_z(cells)), cells, dim=0)

"""What all experiments share: copies to work on, a state that is put back, a bar, cells."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from rich.progress import track

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.threads import as_told
from pyro_scanvi.validation import InputError

T = TypeVar("T")


@contextmanager
def apart(seed: int | None = None) -> Iterator[None]:
    """Draws, threads and Pyro's store of an experiment's own; those that were found come back."""
    with torch.random.fork_rng(), as_told(), pyro.get_param_store().scope():
        if seed is not None:
            torch.manual_seed(seed)
        yield


def copy_of(model: SCANVI) -> SCANVAE:
    """The network of a model in eval mode, to work on: gradients and modes stay there."""
    vae = copy.deepcopy(model.module).eval()
    vae.zero_grad(set_to_none=True)
    return vae


def cells_of(model: SCANVI, positions: Any) -> Cells:
    """Cells of the training data, by positions, as a whole data set of their own."""
    data, _ = model.encoded(None, positions)
    return data[np.arange(len(data))].to(model.module.y_prior.device)


def some_cells(
    model: SCANVI, positions: Sequence[int] | None, n_cells: int
) -> tuple[list[str], Cells]:
    """Names of those cells, or of so many at random, and the cells with labels hidden."""
    here = chosen(model, n_cells, 0) if positions is None else np.asarray(positions)
    names = model.encoded(None, here.tolist())[1]
    return [str(name) for name in names], cells_of(model, here.tolist()).hide_labels()


def chosen(model: SCANVI, n_cells: int, seed: int) -> np.ndarray:
    """Positions of some cells, drawn without replacement; InputError if there are not so many."""
    n_all = len(model.encoded(None, None)[0])
    if n_cells > n_all:
        raise InputError(f"n_cells={n_cells}, expected at most {n_all}, those of the model")
    return np.sort(np.random.default_rng(seed).choice(n_all, n_cells, replace=False))


def clock(device: torch.device) -> Callable[[], float]:
    """Starts to count seconds; called, it says how many.

    Of the processor, where that is the device: what else runs on the machine does not count.
    """
    read = time.process_time if device.type == "cpu" else time.perf_counter
    start = read()
    return lambda: read() - start


def tracked(steps: Iterable[T], n_steps: int, what: str, progress_bar: bool) -> Iterable[T]:
    """The same, with a bar over them."""
    return track(steps, description=what, total=n_steps, disable=not progress_bar)

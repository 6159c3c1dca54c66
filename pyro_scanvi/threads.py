"""How many threads torch computes with: the number that it was told, whoever else set OpenMP's.

The last bits of a sum depend on the number of threads. numba, which scanpy calls, sets OpenMP's
for every library of the process the first time that it runs something in parallel, and torch
follows without a word: ``sc.pp.normalize_total`` of a sparse matrix can double torch's threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def told() -> int:
    """The number that torch was told, by OMP_NUM_THREADS, MKL_NUM_THREADS or set_num_threads.

    Untold, it is torch's own choice, the number of cores.
    """
    # OpenMP counts for each Python thread; in a new one torch sets what it was told.
    return _in_a_new_thread(torch.get_num_threads)


@contextmanager
def as_told() -> Iterator[None]:
    """Compute with as many threads as torch was told; the number that was found comes back."""
    found, wanted = torch.get_num_threads(), told()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if torch.get_num_threads() != found:
            torch.set_num_threads(found)
            # That told torch too; a later run is to find what the user said.
            _in_a_new_thread(lambda: torch.set_num_threads(wanted))


def _in_a_new_thread(do: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(do).result()

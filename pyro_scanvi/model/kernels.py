"""What kernels that numba compiles for the CPU share: how, for which tensors, and in threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter


def compiled(function: Callable) -> Any:
    """The function as machine code, kept in a cache folder where there is a place for one."""
    # Products may be fused with sums; no other freedom, or NaN and small differences would be lost.
    how: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
    try:
        return numba.njit(function, cache=True, **how)
    except RuntimeError:
        return numba.njit(function, **how)


inlined: Callable[[Callable], Any] = partial(
    numba.njit, forceinline=True, error_model="numpy", fastmath={"contract"}
)


def serve(*arguments: Tensor) -> bool:
    """Whether kernels can compute with these: plain tensors, float32, in the memory of the CPU.

    Nor is there anything under way that has to see each operation, a trace or ``torch.func``.
    """
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        type(t) in (Tensor, Parameter) and t.dtype == torch.float32 and t.is_cpu and t.numel()
        for t in arguments
    )


def unexpanded(t: Tensor) -> Tensor:
    """Without the leading dimensions that it was expanded to."""
    while t.dim() > 1 and t.stride(0) == 0:
        t = t[0]
    return t


def rows_of(t: Tensor) -> np.ndarray:
    """Its rows, without the copies that expanding it has made of all of them."""
    bare = unexpanded(t.detach())
    return bare.reshape(-1, bare.shape[-1] if bare.dim() else 1).contiguous().numpy()


def over_rows(kernel: Callable, n_rows: int, n_threads: int, *arguments: Any) -> list[Any]:
    """What ``kernel(start, stop, *arguments)`` gives of all rows, by so many threads at most."""
    n_threads = max(1, min(torch.get_num_threads(), n_threads, n_rows))
    if n_threads == 1:
        return [kernel(0, n_rows, *arguments)]
    ends = np.linspace(0, n_rows, n_threads + 1).astype(int)
    with ThreadPoolExecutor(n_threads) as pool:
        parts = [pool.submit(kernel, *ends[i : i + 2], *arguments) for i in range(n_threads)]
    return [part.result() for part in parts]


def slopes_of_plain(
    result: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], slope: Tensor
) -> list[Tensor | None]:
    """Of those inputs that want one, with a graph: of a result that torch's operations gave."""
    asked = [t for t, w in zip(inputs, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(result, asked, slope, create_graph=True))
    return [next(found) if w else None for w in wanted]

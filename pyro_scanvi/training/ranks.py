"""Several processes that train one model: who they are, and the few things that they say.

Each takes its part of every minibatch, and a step is that of one process on all of it: what is
summed or averaged over cells is so over those of all processes. Torch's DistributedDataParallel
averages the gradients; what is not linear in the cells is here, or asks here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_scanvi.data.minibatches import Cells, Share
from pyro_scanvi.model.networks import BatchNorm
from pyro_scanvi.validation import InputError

_Said = TypeVar("_Said")
START = "torchrun --standalone --nproc-per-node={n} train.py"


@dataclass(frozen=True)
class Processes:
    """The processes of a training, and which of them this is; one, unless told.

    Attributes
    ----------
    n
        Their number.
    n_here
        How many of them are on this machine.
    rank
        The number of this one, from 0.
    """

    n: int = 1
    n_here: int = 1
    rank: int = 0

    @property
    def share(self) -> Share:
        """What this one takes of each minibatch."""
        return Share(self.rank, self.n)

    def each(self, said: _Said) -> list[_Said]:
        """What each of them says here, in their order; all wait for it."""
        heard: list[Any] = [said] * self.n
        if self.n > 1:
            distributed.all_gather_object(heard, said)
        return heard

    def all(self, true: Tensor) -> bool:
        """Whether it is true in each of them."""
        return bool(true if self.n == 1 else gathered(true.float()).all())

    def joined(self, cells: Cells) -> tuple[Tensor | float, Cells]:
        """The weight of a loss of these cells in that of the minibatch of all, and the cells.

        The mean over processes of weight times loss is then the loss of one process on the cells
        of all. A mean over cells needs the weight alone; of another, such as that over labelled
        cells, ``cells.pooled`` gives the denominator.
        """
        if self.n == 1:
            return 1.0, cells
        part = cells.x.new_tensor(len(cells))
        part = part / gathered(part).sum()

        def pooled(total: Tensor) -> Tensor:
            return part * gathered(total.to(part.dtype)).sum(0)

        return part * self.n, replace(cells, pooled=pooled)

    def trainer_arguments(self, devices: int | str | Sequence[int]) -> dict[str, Any]:
        """Those of Lightning's Trainer, with what the user said of devices."""
        if self.n == 1:
            return {"devices": 1 if devices == "auto" else devices}
        return {
            "devices": list(devices) if isinstance(devices, list | tuple) else self.n_here,
            "num_nodes": self.n // self.n_here,
            # A step may leave parts of the model out, as the warm start does.
            "strategy": DDPStrategy(find_unused_parameters=True),
            "use_distributed_sampler": False,  # ours deals the cells
        }

    def check_smallest(self, n_cells: int, batch_size: int, what: str) -> None:
        """Refuse minibatches in which there is not a cell for each of them."""
        smallest = n_cells // max(1, -(-n_cells // (batch_size * self.n)))
        if n_cells and smallest < self.n:
            raise InputError(
                f"{n_cells} cells {what} make minibatches of {smallest}, and {self.n} processes "
                "share each; raise batch_size, or start fewer processes"
            )


ALONE = Processes()


class _Gathered(torch.autograd.Function):
    """Rows of all processes; a row's gradient is that of the losses of all."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        rows = row.new_zeros(distributed.get_world_size(), *row.shape)
        rows[distributed.get_rank()] = row
        distributed.all_reduce(rows)  # adds zeros: the same bits in each process
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]


def gathered(row: Tensor) -> Tensor:
    """This tensor of each process, (n, ...), with a gradient; all wait for it."""
    return _Gathered.apply(row)


@contextmanager
def gathering(network: nn.Module, gather: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Batch norms inside take their statistics of what `gather` gives; None is their own rows."""
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    before = [norm.gather for norm in norms]
    try:
        for norm in norms:
            norm.gather = gather
        yield
    finally:
        for norm, found in zip(norms, before, strict=True):
            norm.gather = found


def check_batch_norms(network: nn.Module) -> None:
    """Refuse batch norms that would take statistics of the cells of their own process."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm):
            raise InputError(
                f"{name} is a {type(module).__name__}, whose statistics would be those of one "
                "process; take pyro_scanvi.model.networks.BatchNorm, or train in one process"
            )


def launched(devices: int | str | Sequence[int]) -> Processes:
    """The processes that torchrun or srun has started.

    Parameters
    ----------
    devices
        As for Lightning's Trainer: on this machine; "auto" is what was started.

    Raises
    ------
    InputError
        If there is no launcher, or it started another number.
    """
    found = _of_torchrun() if TorchElasticEnvironment.detect() else _of_srun()
    wanted = len(devices) if isinstance(devices, list | tuple) else devices
    if found is None:
        n = wanted if str(wanted).isdigit() else 2
        raise InputError(
            "strategy='ddp' needs a launcher that starts the processes, and there is none; start "
            f"the script by {START.format(n=n)}, or by srun; see docs/many_machines.md"
        )
    if str(wanted) not in ("auto", str(found.n_here)):
        raise InputError(
            f"devices={devices!r}, but the launcher started {found.n_here} processes on this "
            f"machine; give devices={found.n_here}, or start others"
        )
    return found


def is_first() -> bool:
    """Whether this process is the one that writes, or the only one."""
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_rank() == 0


def _of_torchrun() -> Processes:
    n, here, rank = (int(os.environ[k]) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"))
    return Processes(n, here, rank)


def _of_srun() -> Processes | None:
    """As Lightning reads it."""
    names = "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID"
    if not set(names) <= set(os.environ):
        return None
    n, here, rank = (int(os.environ[name]) for name in names)
    return Processes(n, here, rank)

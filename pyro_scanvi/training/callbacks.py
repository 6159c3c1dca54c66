"""Our own Lightning callbacks: progress, hints, whether processes agree, the last good weights."""

# mypy: disable-error-code="override"
# Lightning's hooks take any module; these are given to Trainers of our own alone.

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from pyro_scanvi.training import nonfinite
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.training.ranks import Processes
from pyro_scanvi.validation import Advice, InputError

MANY_GENES = 5000
LONG_RUN = 120.0  # seconds


class ProgressBar(Callback):
    """One bar over the epochs, with the ELBO and the time that remains."""

    def __init__(self):
        text = TextColumn("{task.description}")
        self.bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def on_train_start(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Draw it."""
        done = trainer.current_epoch  # a resumed run starts later
        self.task = self.bar.add_task("epoch", total=trainer.max_epochs, completed=done)
        self.bar.start()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Advance it."""
        # Lightning calls this before the module has logged its own scores of the epoch.
        train = module.train_scores
        shown = [f"{module.phase.name}  ELBO {train.sums['elbo'] / max(train.n_cells, 1):.1f}"]
        held_out = trainer.callback_metrics.get(f"elbo_{module.phase.held_out}")
        if module.phase.watched and held_out is not None:
            shown.append(f"validation {held_out.item():.1f}")
        self.bar.update(self.task, advance=1, description="  ".join(shown))

    def on_train_end(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Leave it standing."""
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, module: LightningObjective, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self.bar.stop()


class Agreement(Callback):
    """Ends all processes where they do not train the same: other data, settings or checkpoints.

    Parameters
    ----------
    processes
        Those that train.
    told
        What must be equal in all of them, by name.
    """

    def __init__(self, processes: Processes, told: Mapping[str, Any]):
        self.processes, self.told = processes, told

    def setup(self, trainer: lightning.Trainer, module: LightningObjective, stage: str) -> None:
        """Lightning calls this when they have met, before they share weights."""
        for rank, other in enumerate(self.processes.each(self.told)):
            differ = [
                f"{name} is {self.told.get(name)!r} in process {self.processes.rank} and "
                f"{other.get(name)!r} in process {rank}"
                for name in sorted({*self.told, *other})
                if self.told.get(name) != other.get(name)
            ]
            if differ:
                raise InputError(
                    f"the processes do not train the same: {'; '.join(differ[:5])}; give each the "
                    "same AnnData and arguments, and folders that all of them see"
                )


class TimeHint(Callback):
    """Says once, after the first epoch that is run, how long many genes will take.

    Parameters
    ----------
    n_genes
        Genes that the model reads.
    later_epochs
        For a phase of the run, the epochs that come after it.
    clock
        Seconds from any moment on.
    """

    def __init__(
        self,
        n_genes: int,
        later_epochs: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.n_genes, self.later_epochs, self.clock = n_genes, later_epochs, clock
        self.silent = n_genes <= MANY_GENES

    def on_train_start(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Of each phase one epoch is measured, of a resumed one too."""
        self.measured = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Start the clock."""
        self.started = self.clock()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Read it, unless the epoch was cut short."""
        if self.silent or self.measured or not trainer.is_last_batch:
            return
        self.measured = True
        seconds = self.clock() - self.started
        left = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        left += self.later_epochs.get(module.phase.name, 0)
        if left * seconds > LONG_RUN:
            self.silent = True
            self._say(seconds, left)

    def _say(self, seconds: float, left: int) -> None:
        advice = Advice(
            f"the first epoch took {seconds:.1f} s, so that the {left} that follow will take about "
            f"{left * seconds / 60:.0f} minutes. The model reads {self.n_genes} genes: "
            "SCANVI.setup_anndata(..., n_top_genes=2000) trains on the most variable ones",
            {"n_top_genes": 2000},
        )
        warnings.warn(advice, stacklevel=2)


class LastGoodWeights(Callback):
    """Keeps the last weights for which loss and gradient were finite, and puts them back.

    A step is taken from finite gradients only; if the loss after it is not finite, the step is
    undone, batch-norm statistics included.
    """

    def on_train_start(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Keep the weights that training starts from."""
        self.parameters = list(module.vae.parameters())
        self.tensors = [*self.parameters, *module.vae.buffers()]
        self.kept = [tensor.detach().clone() for tensor in self.tensors]

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        module: LightningObjective,
        optimizer: Optimizer,
    ) -> None:
        """Keep the weights that gave this gradient, if it is finite."""
        # A sum is not finite where a term is not, and far faster than a look at each.
        sums = [p.grad.sum() for p in self.parameters if p.grad is not None]
        if sums and not torch.stack(sums).isfinite().all():
            raise module.diagnose("gradient")
        with torch.no_grad():
            torch._foreach_copy_(self.kept, self.tensors)

    def on_train_end(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """The last step has no loss after it; look at its weights."""
        if not _all_finite(module.vae):
            self._restore()
            raise NonFiniteError("weight", module.epoch, nonfinite.Fault())

    def on_exception(
        self, trainer: lightning.Trainer, module: LightningObjective, exception: BaseException
    ) -> None:
        """Put them back where the loss or the gradient was the reason."""
        if isinstance(exception, NonFiniteError):
            self._restore()

    def _restore(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, self.kept)


def _all_finite(module: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())

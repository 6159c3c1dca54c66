"""Training a model: unsupervised warm start, then the objective; fresh, further, or resumed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.utils.data import DataLoader

from pyro_scanvi.data.minibatches import (
    CellData,
    ordered_loader,
    split,
    subsampled_labels,
    training_loader,
)
from pyro_scanvi.model.objective import BoundModule
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.model.unsupervised import Unsupervised
from pyro_scanvi.threads import as_told, told
from pyro_scanvi.training import checkpoints
from pyro_scanvi.training.callbacks import TimeHint
from pyro_scanvi.training.course import Course
from pyro_scanvi.training.module import TrainingPlan
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.training.plan import Plan
from pyro_scanvi.training.trainer import TrainerOptions, quiet_lightning, stop_on_interrupt
from pyro_scanvi.validation import InputError

Rows = list[dict[str, Any]]
MAY_CHANGE = ("max_epochs",)  # between a run and the run that resumes it


def fit(
    vae: SCANVAE,
    data: CellData,
    plan: Plan,
    course: Course,
    options: TrainerOptions,
    history: Rows,
    ckpt_path: str | Path | None = None,
    guards: Sequence[Callback] = (),
) -> None:
    """Train `vae` in place and append to `history`; leaves the model in eval mode.

    Epochs are counted on from those in the history: training on shuffles and draws anew. `guards`
    are callbacks of the model itself, for every phase.

    Raises
    ------
    InputError
        If early stopping or the learning rate watches scores that never come, or the checkpoint is
        damaged, of another run, or would be replaced.
    NonFiniteError
        If a loss or gradient is not finite; the last good weights are kept.
    """
    if options.counts_steps and (ckpt_path is not None or options.checkpoint_dir is not None):
        raise InputError(
            "max_steps cannot go with checkpoints: where Lightning counts steps, it does not go on "
            "from the end of an epoch; leave max_steps out, or ckpt_path and checkpoint_dir"
        )
    run = _Run.of(vae, data, plan, course, options, history, guards)
    checkpoint = None
    ckpt_path = checkpoints.find(ckpt_path, options.checkpoint_dir)
    if ckpt_path is not None:
        checkpoint = checkpoints.read(ckpt_path)
        checkpoints.check_resumable(checkpoint, run.identity, vae.state_dict())
        checkpoints.check_epochs(checkpoint, course.max_epochs)
    with ExitStack() as stack:
        stack.enter_context(as_told())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(quiet_lightning())
        stack.callback(vae.eval)
        stack.callback(vae.to, vae.y_prior.dtype)  # Lightning leaves it in its own precision
        for phase in (run.pretraining(), run.training()):
            if phase.max_epochs and not run.go(phase, ckpt_path, checkpoint):
                break


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with an objective and a plan of its own, and callbacks beside ours."""

    name: str
    max_epochs: int
    bound: BoundModule
    plan: Plan
    callbacks: Sequence[Callback] = ()


@dataclass
class _Run:
    """What the phases of a run share."""

    vae: SCANVAE
    data: CellData
    plan: Plan
    course: Course
    options: TrainerOptions
    history: Rows
    guards: Sequence[Callback]
    positions: tuple[np.ndarray, np.ndarray]  # of the cells to train on and to score
    identity: dict[str, Any]
    hint: TimeHint

    @classmethod
    def of(cls, vae, data, plan, course, options, history, guards) -> "_Run":
        """Split the data; refuse what cannot be trained."""
        positions = split(data.label, course.train_size, course.split_seed, course.validation_size)
        watching = {
            "early_stopping": course.early_stopping is not None,
            "lr_scheduler_metric": plan.watches_validation,
        }
        for name in (name for name, watches in watching.items() if watches):
            _check_scored(name, len(positions[1]), course, options)
        settings = asdict(course) | plan.record()
        fixed = {k: v for k, v in settings.items() if k not in MAY_CHANGE}
        identity = fixed | options.computing()
        identity |= {"threads": told(), "data": checkpoints.digest(data)}
        hint = TimeHint(vae.n_input, later_epochs={"pretrain": course.max_epochs})
        return cls(vae, data, plan, course, options, history, guards, positions, identity, hint)

    def pretraining(self) -> Phase:
        """The warm start, without the user's callbacks: its scores have other names."""
        story = Unsupervised(self.vae)
        bound = story.objective()(story.model, story.guide)
        plan = replace(self.plan, reduce_lr_on_plateau=False)
        callbacks = [*self.guards, self.hint]
        return Phase("pretrain", self.course.pretrain_epochs, bound, plan, callbacks)

    def training(self) -> Phase:
        """The objective itself."""
        callbacks = [*self.guards, self.hint, *self.options.callbacks]
        if self.course.early_stopping is not None:
            patience = self.course.early_stopping_scorings
            callbacks.append(EarlyStopping("elbo_validation", mode="max", patience=patience))
        bound = self.plan.objective(self.vae)(self.vae.model, self.vae.guide)
        return Phase("train", self.course.max_epochs, bound, self.plan, callbacks)

    def go(self, phase: Phase, ckpt_path: Path | None, checkpoint: dict[str, Any] | None) -> bool:
        """Run a phase, unless a checkpoint lies behind it; whether the next may follow."""
        ours = checkpoint[checkpoints.KEY] if checkpoint else {"phase": ""}
        if ours["phase"] == "train" and phase.name == "pretrain":
            return True
        resumed = ours["phase"] == phase.name
        first_epoch = ours["first_epoch"] if resumed else epochs_in(self.history)
        loaders = self._loaders(first_epoch)
        if resumed:  # Lightning tells the sampler from the second epoch on
            loaders[0].sampler.set_epoch(checkpoint["epoch"] + 1)
        trainer = self.options.trainer(phase.max_epochs, self.course, phase.plan, phase.callbacks)
        module = self._module(phase, first_epoch)
        module.train()  # Lightning keeps the mode that it finds
        torch.manual_seed(self.course.seed + first_epoch)
        try:
            with stop_on_interrupt(trainer):
                resume = {"ckpt_path": ckpt_path if resumed else None, "weights_only": True}
                trainer.fit(module, *loaders, **resume)
        except NonFiniteError as error:
            error.fault.cells = np.sort(self.positions[error.held_out][error.fault.cells])
            raise
        return not trainer.should_stop

    def _module(self, phase: Phase, first_epoch: int) -> TrainingPlan:
        subsampled = self.course.n_samples_per_label is not None
        return TrainingPlan(
            self.vae,
            phase.plan,
            phase.bound,
            phase.name,
            first_epoch,
            self.history,
            self.identity,
            self._classified if subsampled else None,
        )

    def _loaders(self, first_epoch: int) -> list[DataLoader]:
        course, (train, validation) = self.course, self.positions
        shuffled = (course.batch_size, course.seed, first_epoch, course.class_balanced)
        loaders = [training_loader(self.data.subset(train), *shuffled)]
        if len(validation):
            loaders.append(ordered_loader(self.data.subset(validation), course.batch_size))
        return loaders

    def _classified(self, epoch: int) -> np.ndarray:
        """Which training cells count in the classification term, drawn anew in each epoch."""
        rng = np.random.default_rng([self.course.seed, epoch, 1])
        label = self.data.label[self.positions[0]]
        return subsampled_labels(label, self.course.n_samples_per_label, rng)


def _check_scored(name: str, n_held_out: int, course: Course, options: TrainerOptions) -> None:
    """Refuse to watch scores that never come."""
    if not n_held_out:
        raise InputError(
            f"{name} needs held-out cells, and there are none; lower train_size, or raise "
            "validation_size"
        )
    if not course.scores:
        raise InputError(
            f"{name} needs scores of held-out cells, but check_val_every_n_epoch="
            f"{course.check_val_every_n_epoch} is more than max_epochs={course.max_epochs}; lower "
            "check_val_every_n_epoch"
        )
    if not options.scores:
        raise InputError(
            f"{name} needs scores of held-out cells, but limit_val_batches=0 scores none; leave it "
            "out of trainer_kwargs"
        )


def epochs_in(history: Rows) -> int:
    """Number of epochs in a history."""
    return 1 + max((row["epoch"] for row in history), default=-1)

"""Training a model: its phases in turn; fresh, further, or resumed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyro
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelSummary
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_scanvi.data.minibatches import (
    CellData,
    Cells,
    ordered_loader,
    split,
    subsampled_labels,
    training_loader,
)
from pyro_scanvi.model.objectives import ELBO, Layered
from pyro_scanvi.model.scanvae import SCANVAE, evaluated
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.threads import as_told, told
from pyro_scanvi.training import checkpoints
from pyro_scanvi.training.callbacks import Agreement, LastGoodWeights, ProgressBar, TimeHint
from pyro_scanvi.training.checkpoints import LastCheckpoint, Saved, WholeFiles
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.phases import PHASES, Phase
from pyro_scanvi.training.ranks import Processes, check_batch_norms, gathered, gathering
from pyro_scanvi.training.settings import DataSettings, Plan, TrainerSettings, described
from pyro_scanvi.training.trainer import quiet_lightning, stop_on_interrupt
from pyro_scanvi.validation import InputError, look_up

Rows = list[dict[str, Any]]
MAY_CHANGE = ("max_epochs",)  # between a run and the run that resumes it
TRIAL = 8  # cells that an objective of one's own is tried on
BUILT_IN = (None, ELBO(), Layered())  # of which a fault is the model's, and told by site and shape


def fit(
    vae: SCANVAE,
    data: CellData,
    plan: Plan,
    data_settings: DataSettings,
    trainer_settings: TrainerSettings,
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
        If early stopping or the learning rate watches scores that never come, the objective gives
        no loss, or the checkpoint is damaged, of another run, or would be replaced.
    NonFiniteError
        If a loss or gradient is not finite; the last good weights are kept.
    """
    folder = trainer_settings.checkpoint_dir
    if trainer_settings.counts_steps and (ckpt_path is not None or folder is not None):
        raise InputError(
            "max_steps cannot go with checkpoints: where Lightning counts steps, it does not go on "
            "from the end of an epoch; leave max_steps out, or ckpt_path and checkpoint_dir"
        )
    run = _Run(vae, data, plan, data_settings, trainer_settings, history, guards)
    path = checkpoints.find(ckpt_path, folder)
    saved = None if path is None else run.resumable(checkpoints.read(path))
    with ExitStack() as stack:
        stack.enter_context(as_told())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(quiet_lightning())
        stack.callback(vae.eval)
        dtype = vae.y_prior.dtype
        stack.callback(lambda: vae.to(dtype))  # Lightning leaves it in its own precision
        for phase in run.phases(saved):
            if not run.go(phase, saved):
                break


@dataclass
class _Run:
    """What the phases of a run share."""

    vae: SCANVAE
    data: CellData
    plan: Plan
    data_settings: DataSettings
    trainer_settings: TrainerSettings
    history: Rows
    guards: Sequence[Callback]
    positions: tuple[np.ndarray, np.ndarray] = field(init=False)  # of the cells to train on, score
    identity: dict[str, Any] = field(init=False)
    hint: TimeHint = field(init=False)
    processes: Processes = field(init=False)

    def __post_init__(self) -> None:
        """Split the data; refuse what cannot be trained."""
        settings, self.processes = self.data_settings, self.trainer_settings.processes()
        shares = settings.train_size, settings.split_seed, settings.validation_size
        self.positions = split(self.data.label, *shares)
        if settings.early_stopping is not None:
            self._check_scored("early_stopping")
        if self.plan.watches_validation:
            self._check_scored("lr_scheduler_metric")
        if self.plan.objective not in BUILT_IN:
            cells = self.data[self.positions[0][:TRIAL]].to(self.vae.y_prior.device)
            check_objective(self.vae, self.plan, cells)
        if self.processes.n > 1:
            self._check_shared()
        self.identity = self._identity()
        lengths = [phase.n_epochs(settings) for phase in PHASES]
        later = {phase.name: sum(lengths[i + 1 :]) for i, phase in enumerate(PHASES)}
        self.hint = TimeHint(self.vae.n_input, later)
        self.hint.silent |= self.processes.rank > 0

    def resumable(self, saved: Saved) -> Saved:
        """The same checkpoint; InputError if this run cannot go on from it."""
        checkpoints.check_resumable(saved, self.identity, self.data, self.vae.state_dict())
        checkpoints.check_epochs(saved, _phase(saved).n_epochs(self.data_settings))
        return saved

    def phases(self, saved: Saved | None) -> list[Phase]:
        """Those that have epochs, from that of the checkpoint on."""
        start = 0 if saved is None else PHASES.index(_phase(saved))
        return [phase for phase in PHASES[start:] if phase.n_epochs(self.data_settings)]

    def go(self, phase: Phase, saved: Saved | None) -> bool:
        """Run a phase, or go on with it where it was saved; whether the next may follow."""
        here = saved if saved is not None and saved.phase == phase.name else None
        first_epoch = epochs_in(self.history) if here is None else here.first_epoch
        train, validation = self._loaders(first_epoch)
        if here is not None:  # Lightning tells the sampler from the second epoch on
            train.sampler.set_epoch(here.n_epochs)  # type: ignore[attr-defined]  # it is ours
        trainer = self._trainer(phase, [] if self.processes.n == 1 else [self._agreement(here)])
        module = self._module(phase, first_epoch)
        module.train()  # Lightning keeps the mode that it finds
        seed = self.data_settings.seed + first_epoch
        torch.manual_seed(seed ^ (self.processes.rank << 40))  # draws of its own
        path = None if here is None else here.path
        gather = gathered if self.processes.n > 1 else None
        with stop_on_interrupt(trainer), gathering(self.vae, gather):
            trainer.fit(module, train, validation, ckpt_path=path, weights_only=True)
        return not trainer.should_stop

    def _identity(self) -> dict[str, Any]:
        """What a run that resumes this one must share."""
        settings = asdict(self.data_settings) | self.plan.record()
        fixed = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
        surroundings = {"threads": told(), "data": checkpoints.digest(self.data)}
        return fixed | self.trainer_settings.computing() | surroundings

    def _trainer(self, phase: Phase, before: Sequence[Callback]) -> lightning.Trainer:
        """A Lightning Trainer that writes nothing by itself; InputError if it refuses its settings.

        It does for a device that is not there.
        """
        settings, callbacks = self.trainer_settings, [*before, *self._callbacks(phase)]
        together = self.processes.trainer_arguments(settings.devices)
        kinds = {  # Lightning refuses such callbacks where it is told to have none
            "enable_checkpointing": Checkpoint,
            "enable_progress_bar": LightningProgressBar,
            "enable_model_summary": ModelSummary,
        }
        enabled = {k: any(isinstance(c, v) for c in callbacks) for k, v in kinds.items()}
        arguments: dict[str, Any] = {
            "max_epochs": phase.n_epochs(self.data_settings),
            "accelerator": settings.accelerator,
            "precision": settings.precision,
            "callbacks": callbacks,
            "logger": settings.logger,
            "gradient_clip_val": self.plan.gradient_clip_norm,
            "check_val_every_n_epoch": self.data_settings.check_val_every_n_epoch,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "plugins": WholeFiles(),
        }
        try:
            return lightning.Trainer(
                **(arguments | enabled | together | dict(settings.trainer_kwargs))
            )
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise InputError(f"Lightning's Trainer refuses to run like this: {error}") from error

    def _callbacks(self, phase: Phase) -> list[Callback]:
        """Ours, those of the model, and where the scores are watched those of the user."""
        settings = self.trainer_settings
        callbacks: list[Callback] = [LastGoodWeights()]
        if settings.progress_bar and not self.processes.rank:
            callbacks.append(ProgressBar())
        if settings.checkpoint_dir is not None:
            callbacks.append(LastCheckpoint(user_path(settings.checkpoint_dir)))
        callbacks += [*self.guards, self.hint]
        if not phase.watched:
            return callbacks
        patience = self.data_settings.early_stopping_scorings
        if patience is None:
            return [*callbacks, *settings.callbacks]
        stopping = EarlyStopping(f"elbo_{phase.held_out}", mode="max", patience=patience)
        return [*callbacks, *settings.callbacks, stopping]

    def _module(self, phase: Phase, first_epoch: int) -> LightningObjective:
        n_per_label = self.data_settings.n_samples_per_label
        return LightningObjective(
            self.vae,
            self.plan,
            phase,
            first_epoch,
            self.history,
            self.identity,
            None if n_per_label is None else partial(self._classified, n_per_label),
            self.processes,
        )

    def _loaders(self, first_epoch: int) -> tuple[DataLoader, DataLoader | None]:
        """Of the cells to train on and of those to score, None where there are none."""
        settings, (train, validation) = self.data_settings, self.positions
        shuffled = settings.batch_size, settings.seed, first_epoch, settings.class_balanced
        share = self.processes.share
        loader = training_loader(self.data.subset(train), *shuffled, share)
        if not len(validation):
            return loader, None
        return loader, ordered_loader(self.data.subset(validation), settings.batch_size, share)

    def _classified(self, n_per_label: int, epoch: int) -> np.ndarray:
        """Which training cells count in the classification term, drawn anew in each epoch."""
        rng = np.random.default_rng([self.data_settings.seed, epoch, 1])
        return subsampled_labels(self.data.label[self.positions[0]], n_per_label, rng)

    def _check_shared(self) -> None:
        """Refuse what several processes cannot train as one would."""
        check_batch_norms(self.vae)
        for positions, what in zip(self.positions, ("to train on", "to score"), strict=True):
            self.processes.check_smallest(len(positions), self.data_settings.batch_size, what)

    def _agreement(self, saved: Saved | None) -> Agreement:
        """What all processes must share: they may differ in threads, of which none must know."""
        done = None if saved is None else saved.n_epochs
        told = {k: v for k, v in self.identity.items() if k != "threads"}
        return Agreement(self.processes, told | {"epochs of the checkpoint": done})

    def _check_scored(self, name: str) -> None:
        """Refuse to watch scores that never come."""
        settings = self.data_settings
        if not len(self.positions[1]):
            raise InputError(
                f"{name} needs held-out cells, and there are none; lower train_size, or raise "
                "validation_size"
            )
        if not settings.scores:
            raise InputError(
                f"{name} needs scores of held-out cells, but check_val_every_n_epoch="
                f"{settings.check_val_every_n_epoch} is more than max_epochs={settings.max_epochs};"
                " lower check_val_every_n_epoch"
            )
        if not self.trainer_settings.scores:
            raise InputError(
                f"{name} needs scores of held-out cells, but limit_val_batches=0 scores none; "
                "leave it out of trainer_kwargs"
            )


def epochs_in(history: Rows) -> int:
    """Number of epochs in a history."""
    return 1 + max((row["epoch"] for row in history), default=-1)


def has_learned_labels(history: Rows) -> bool:
    """Whether it holds an epoch of a phase after which the model answers."""
    learning = [phase.name for phase in PHASES if phase.learns_labels]
    return any(row["split"] in learning for row in history)


def check_objective(vae: SCANVAE, plan: Plan, cells: Cells) -> None:
    """Refuse an objective of one's own that gives no loss; the model stays as it is.

    What its code raises for these cells comes with a note that nothing was trained yet.
    """
    name = described(plan.objective)
    try:
        with torch.random.fork_rng(), evaluated(vae), pyro.validation_enabled(False):
            bound = plan.bind(vae)
            _check_bound(bound, name, plan)
            loss = getattr(bound.parts(cells), "loss", None)
    except InputError:
        raise
    except Exception as error:
        error.add_note(f"objective={name} raised it for {len(cells)} cells, before any training")
        raise
    if not (isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad):
        raise InputError(
            f"objective={name}: parts(cells).loss is {loss!r}, expected a tensor without "
            "dimensions that has a gradient; return ObjectiveParts(loss)"
        )


def _check_bound(bound: Any, name: str, plan: Plan) -> None:
    if not callable(getattr(bound, "parts", None)):
        raise InputError(
            f"objective={name} gives {type(bound).__name__}, which has no parts(cells); return a "
            "bound objective, such as ELBO()(vae, plan)"
        )
    if not hasattr(bound, "kl_weight"):
        raise InputError(
            f"objective={name} gives {type(bound).__name__}, which has no kl_weight; set it to "
            "1.0, or to None where it weighs no KL"
        )
    if bound.kl_weight is None and plan.changes_kl_weight:
        raise InputError(
            f"objective={name} has no KL weight, and the plan changes it; leave KL warm-up and "
            "max_kl_weight out"
        )


def _phase(saved: Saved) -> Phase:
    return look_up({phase.name: phase for phase in PHASES}, saved.phase, f"{saved.path}: phase")

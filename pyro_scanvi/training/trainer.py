"""The Lightning Trainer that runs it: options, a Ctrl-C that loses nothing, and quiet."""

import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pyro_scanvi.storage.files import user_path
from pyro_scanvi.training.callbacks import LastGoodWeights, ProgressBar
from pyro_scanvi.training.checkpoints import LastCheckpoint, WholeFiles
from pyro_scanvi.training.course import Course
from pyro_scanvi.training.plan import Plan
from pyro_scanvi.validation import InputError, check_flags, check_known, make_plain

NOISE = (
    ".*does not have many workers.*",
    ".*have no `val_dataloader`.*",
    ".*treespec, LeafSpec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
)
PRECISIONS = ("32-true", "64-true", "bf16-mixed")
OURS = (  # arguments of Lightning's Trainer that train spells out or decides
    "accelerator",
    "callbacks",
    "check_val_every_n_epoch",
    "devices",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "logger",
    "max_epochs",
    "num_sanity_val_steps",
    "precision",
    "strategy",
    "num_nodes",
    "plugins",
    "overfit_batches",  # Lightning would replace the sampler
    "val_check_interval",  # the history has one scoring for an epoch
)
COMPUTING = ("accumulate_grad_batches", "limit_train_batches", "limit_val_batches")


@dataclass(frozen=True)
class TrainerOptions:
    """How Lightning runs; what of it changes the numbers is told by :meth:`computing`.

    Attributes
    ----------
    callbacks, logger
        Lightning's, beside our own.
    accelerator, devices, precision
        As for Lightning's Trainer; one device.
    checkpoint_dir
        Folder for the checkpoint of the last epoch; None writes none.
    progress_bar
        Show one.
    trainer_kwargs
        Further arguments of Lightning's Trainer.
    """

    callbacks: Sequence[Callback] = ()
    logger: Logger | Sequence[Logger] | bool = False
    accelerator: str = "auto"
    devices: int | str | Sequence[int] = "auto"
    precision: str = "32-true"
    checkpoint_dir: str | Path | None = None
    progress_bar: bool = True
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        make_plain(self)
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision={self.precision!r}, expected one of {', '.join(PRECISIONS)}: counts "
                "and their likelihoods leave the range of 16-bit floats"
            )
        self._check_devices()
        check_flags(progress_bar=self.progress_bar)
        _check_all(Callback, callbacks=self.callbacks)
        if self.logger not in (None, True, False):
            given = self.logger if isinstance(self.logger, Sequence) else [self.logger]
            _check_all(Logger, logger=given)
        if not isinstance(self.trainer_kwargs, Mapping):
            raise InputError(f"trainer_kwargs={self.trainer_kwargs!r}, expected a dict")
        check_known(self.trainer_kwargs, free_arguments(), "a free argument of Lightning's Trainer")

    @property
    def scores(self) -> bool:
        """Whether the Trainer looks at held-out cells."""
        return self.trainer_kwargs.get("limit_val_batches") != 0

    @property
    def counts_steps(self) -> bool:
        """Whether the run ends after some optimiser steps."""
        return self.trainer_kwargs.get("max_steps", -1) != -1

    def computing(self) -> dict[str, Any]:
        """What a run that resumes one with these options must share."""
        given = {k: self.trainer_kwargs[k] for k in COMPUTING if k in self.trainer_kwargs}
        return {"precision": self.precision} | given

    def trainer(
        self, max_epochs: int, course: Course, plan: Plan, callbacks: Sequence[Callback]
    ) -> lightning.Trainer:
        """A Lightning Trainer that writes nothing by itself; `callbacks` come beside ours.

        Raises
        ------
        InputError
            If Lightning refuses, as for a device that is not there.
        """
        callbacks = [LastGoodWeights(), *self._ours(), *callbacks]
        kinds = {  # Lightning refuses such callbacks where it is told to have none
            "enable_checkpointing": Checkpoint,
            "enable_progress_bar": LightningProgressBar,
            "enable_model_summary": ModelSummary,
        }
        enabled = {k: any(isinstance(c, v) for c in callbacks) for k, v in kinds.items()}
        arguments = {
            "max_epochs": max_epochs,
            "accelerator": self.accelerator,
            "devices": 1 if self.devices == "auto" else self.devices,
            "precision": self.precision,
            "callbacks": callbacks,
            "logger": self.logger,
            "gradient_clip_val": plan.gradient_clip_norm,
            "check_val_every_n_epoch": course.check_val_every_n_epoch,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "plugins": WholeFiles(),
        }
        try:
            return lightning.Trainer(**(arguments | enabled | dict(self.trainer_kwargs)))
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise InputError(f"Lightning's Trainer refuses to run like this: {error}") from error

    def _check_devices(self) -> None:
        index = isinstance(self.devices, list | tuple) and len(self.devices) == 1
        if not index and self.devices not in ("auto", 1, "1"):
            raise InputError(
                f"devices={self.devices!r}, expected 'auto', 1 or a list of one index: training "
                "runs on one device"
            )

    def _ours(self) -> list[Callback]:
        ours: list[Callback] = [ProgressBar()] if self.progress_bar else []
        if self.checkpoint_dir is not None:
            ours.append(LastCheckpoint(user_path(self.checkpoint_dir)))
        return ours


def free_arguments() -> list[str]:
    """The arguments of Lightning's Trainer that may be given as they are."""
    return sorted(set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self", *OURS})


def _check_all(kind: type, **given: Any) -> None:
    """Refuse what is no list of instances of Lightning's."""
    for name, members in given.items():
        if not isinstance(members, Sequence) or not all(isinstance(m, kind) for m in members):
            raise InputError(f"{name}={members!r}, expected a list of Lightning's {kind.__name__}s")


@contextmanager
def stop_on_interrupt(trainer: lightning.Trainer) -> Iterator[None]:
    """On Ctrl-C stop after the minibatch at hand; on a second one at once.

    Lightning's own way ends the interpreter. Signals reach the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        signal.signal(signal.SIGINT, before)
        trainer.should_stop = True
        warnings.warn(
            f"interrupted in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: what was "
            "learned is kept",
            stacklevel=2,
        )

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's notes on devices, on loader processes that would slow us down, on a
    missing validation split, and on what its own code calls that torch has deprecated."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for noise in NOISE:
                warnings.filterwarnings("ignore", message=noise)
            yield
    finally:
        logger.setLevel(level)

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

from pyro_scanvi.callbacks import LastGoodWeights, ProgressBar
from pyro_scanvi.checkpoints import LastCheckpoint, WholeFiles
from pyro_scanvi.checks import InputError, check_known
from pyro_scanvi.course import Course
from pyro_scanvi.files import user_path
from pyro_scanvi.plan import Plan

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
)


@dataclass(frozen=True)
class TrainerOptions:
    """How Lightning runs: nothing here changes what is computed, but for precision and device.

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
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision={self.precision!r}, expected one of {', '.join(PRECISIONS)}: counts "
                "and their likelihoods leave the range of 16-bit floats"
            )
        several = isinstance(self.devices, Sequence) and len(self.devices) != 1
        if self.devices not in ("auto", 1, "1") and (several or isinstance(self.devices, int)):
            raise InputError(
                f"devices={self.devices!r}, expected 'auto', 1 or a list of one index: training "
                "runs on one device"
            )
        known = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self", *OURS}
        check_known(self.trainer_kwargs, sorted(known), "a free argument of Lightning's Trainer")

    def trainer(
        self, max_epochs: int, course: Course, plan: Plan, callbacks: Sequence[Callback]
    ) -> lightning.Trainer:
        """A Lightning Trainer that writes nothing by itself; `callbacks` come beside ours."""
        callbacks = [LastGoodWeights(), *self._ours(), *callbacks]
        kinds = {  # Lightning refuses such callbacks where it is told to have none
            "enable_checkpointing": Checkpoint,
            "enable_progress_bar": LightningProgressBar,
            "enable_model_summary": ModelSummary,
        }
        enabled = {k: any(isinstance(c, v) for c in callbacks) for k, v in kinds.items()}
        devices = 1 if self.devices == "auto" else self.devices
        return lightning.Trainer(
            max_epochs=max_epochs,
            accelerator=self.accelerator,
            devices=devices,
            precision=self.precision,
            callbacks=callbacks,
            logger=self.logger,
            gradient_clip_val=plan.gradient_clip_norm,
            check_val_every_n_epoch=course.check_val_every_n_epoch,
            num_sanity_val_steps=0,
            **enabled,
            **({"log_every_n_steps": 1} | dict(self.trainer_kwargs)),
            plugins=WholeFiles(),
        )

    def _ours(self) -> list[Callback]:
        ours: list[Callback] = [ProgressBar()] if self.progress_bar else []
        if self.checkpoint_dir is not None:
            ours.append(LastCheckpoint(user_path(self.checkpoint_dir)))
        return ours


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

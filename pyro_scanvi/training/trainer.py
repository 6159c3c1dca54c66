"""Around Lightning's Trainer: which arguments are free, a Ctrl-C that loses nothing, and quiet."""

import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning

NOISE = (
    ".*does not have many workers.*",
    ".*have no `val_dataloader`.*",
    ".*treespec, LeafSpec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*recommended to use .*sync_dist=True.*",  # scores are already those of all processes
    ".*find_unused_parameters=True was specified in DDP constructor.*",  # the warm start has some
)
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
    "use_distributed_sampler",  # and here
    "sync_batchnorm",  # ours are so, on the CPU too
    "val_check_interval",  # the history has one scoring for an epoch
)


def free_arguments() -> list[str]:
    """The arguments of Lightning's Trainer that may be given as they are."""
    return sorted(set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self", *OURS})


@contextmanager
def stop_on_interrupt(trainer: lightning.Trainer) -> Iterator[None]:
    """On Ctrl-C stop after the minibatch at hand; on a second one at once.

    Lightning's own way ends the interpreter, as it should where several processes train: they
    would not stop at the same minibatch. Signals reach the main thread only.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if trainer.world_size > 1 or not in_main:
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

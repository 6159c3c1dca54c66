"""Training by Lightning: plan, history, progress bar, and a Ctrl-C that loses nothing."""

import logging
import math
import signal
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import lightning
import pandas as pd
import pyro
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyro_scanvi.checks import InputError
from pyro_scanvi.data import CellData, Cells, ordered_loader, split, training_loader
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.objective import ObjectiveParts, SemiSupervisedELBO
from pyro_scanvi.scanvae import SCANVAE

NOISE = (".*does not have many workers.*", ".*have no `val_dataloader`.*", ".*treespec, LeafSpec.*")


@dataclass(frozen=True)
class Plan:
    """How the objective is minimised.

    Attributes
    ----------
    lr, weight_decay, eps
        Of Adam; learning rate per step.
    classification_ratio
        Weight of the cross-entropy against the ELBO of one cell.
    feed_labels
        Condition the ELBO on known labels (the paper), or marginalise them (scvi-tools).
    n_epochs_kl_warmup
        Epochs over which the KL weight rises to 1; 0 is weight 1 from the first step.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 0.01
    classification_ratio: float = 50.0
    feed_labels: bool = True
    n_epochs_kl_warmup: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:  # NaN fails too
                raise InputError(f"{name}={value}, expected a number that is at least 0")

    def objective(self, vae: SCANVAE) -> SemiSupervisedELBO:
        """The objective of this plan for a model."""
        return SemiSupervisedELBO(vae.q_y, self.classification_ratio, self.feed_labels)

    def kl_weight(self, epoch: int) -> float:
        """KL weight in an epoch, counted from 0."""
        if epoch + 1 >= self.n_epochs_kl_warmup:
            return 1.0
        return (epoch + 1) / self.n_epochs_kl_warmup


class EpochScores:
    """Sums over the minibatches of an epoch, and the scores of its labelled cells."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.n_cells = 0
        self.labels: list[torch.Tensor] = []
        self.probabilities: list[torch.Tensor] = []

    def add(self, parts: ObjectiveParts, cells: Cells) -> None:
        """Take in a minibatch."""
        self.n_cells += len(cells)
        self.sums["elbo"] += parts.elbo().sum().item()
        self.sums["reconstruction"] += parts.reconstruction.sum().item()
        for site, kl in parts.kl.items():
            self.sums[f"kl_{site}"] += kl.sum().item()
        self.sums["cross_entropy"] += parts.classification.sum().item()
        labelled = cells.labelled
        self.labels.append(cells.label[labelled].cpu())
        self.probabilities.append(parts.logits.detach()[labelled].softmax(-1).cpu())

    def mean(self) -> dict[str, float]:
        """Per cell: ELBO, reconstruction and KLs. Per labelled cell: the rest."""
        n_cells = max(self.n_cells, 1)
        means = {name: total / n_cells for name, total in self.sums.items()}
        label = torch.cat(self.labels).numpy()
        if not len(label):
            return means | {"cross_entropy": float("nan")}
        means["cross_entropy"] *= n_cells / len(label)
        return means | label_scores(label, torch.cat(self.probabilities).numpy())


class TrainingPlan(lightning.LightningModule):
    """Runs the objective under Lightning and keeps the history.

    Parameters
    ----------
    vae
        The model to train.
    plan
        How.
    """

    def __init__(self, vae: SCANVAE, plan: Plan):
        super().__init__()
        self.vae, self.plan = vae, plan
        self.elbo = plan.objective(vae)
        self.bound = self.elbo(vae.model, vae.guide)
        self.rows: list[dict[str, float | str]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the parameters that are to be trained."""
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        settings = {"lr": self.plan.lr, "eps": self.plan.eps}
        return torch.optim.Adam(
            trained, weight_decay=self.plan.weight_decay, fused=True, **settings
        )

    def on_train_epoch_start(self) -> None:
        """Set the KL weight of the epoch."""
        self.elbo.kl_weight = self.plan.kl_weight(self.current_epoch)
        self.train_scores = EpochScores()

    def training_step(self, cells: Cells) -> torch.Tensor:
        """Loss of a minibatch."""
        parts = self._parts(cells)
        self.train_scores.add(parts, cells)
        return parts.loss

    def on_validation_epoch_start(self) -> None:
        """Score afresh."""
        self.validation_scores = EpochScores()

    def validation_step(self, cells: Cells) -> None:
        """Score a minibatch of held-out cells."""
        self.validation_scores.add(self._parts(cells), cells)

    def on_validation_epoch_end(self) -> None:
        """Log the scores under the names that callbacks monitor, such as `elbo_validation`."""
        self._close_epoch("validation", self.validation_scores)

    def on_train_epoch_end(self) -> None:
        """Log the scores of the epoch's training minibatches, in training mode."""
        self._close_epoch("train", self.train_scores)

    def _parts(self, cells: Cells) -> ObjectiveParts:
        # The first step of an epoch checks shapes and values; the others save the time.
        checking = self.train_scores.n_cells == 0
        with pyro.validation_enabled(checking):
            return self.bound.parts(cells)

    def _close_epoch(self, name: str, scores: EpochScores) -> None:
        if not scores.n_cells:  # interrupted before the first minibatch
            return
        means = scores.mean()
        self.rows.append({"epoch": self.current_epoch, "split": name} | means)
        self.log_dict({f"{key}_{name}": value for key, value in means.items()})

    def history(self) -> pd.DataFrame:
        """One row for each epoch and split; see :meth:`EpochScores.mean`. Nats."""
        return pd.DataFrame(self.rows)


class ProgressBar(Callback):
    """One bar over the epochs, with the ELBO and the time that remains."""

    def __init__(self):
        text = TextColumn("{task.description}")
        self.bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def on_train_start(self, trainer: lightning.Trainer, module: TrainingPlan) -> None:
        """Draw it."""
        self.task = self.bar.add_task("epoch", total=trainer.max_epochs)
        self.bar.start()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: TrainingPlan) -> None:
        """Advance it."""
        # Lightning calls this before the module has logged its own scores of the epoch.
        train = module.train_scores
        shown = [f"epoch  ELBO {train.sums['elbo'] / max(train.n_cells, 1):.1f}"]
        if "elbo_validation" in trainer.callback_metrics:
            shown.append(f"validation {trainer.callback_metrics['elbo_validation'].item():.1f}")
        self.bar.update(self.task, advance=1, description="  ".join(shown))

    def on_train_end(self, trainer: lightning.Trainer, module: TrainingPlan) -> None:
        """Leave it standing."""
        self.bar.stop()

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        """Give the terminal back."""
        self.bar.stop()


def default_max_epochs(n_cells: int) -> int:
    """scvi-tools' heuristic: 400 epochs, fewer above 20,000 cells, at least 1."""
    return max(1, min(round(20_000 / n_cells * 400), 400))


def fit(
    vae: SCANVAE,
    data: CellData,
    plan: Plan,
    max_epochs: int,
    train_size: float,
    batch_size: int,
    seed: int,
    split_seed: int,
    first_epoch: int,
    early_stopping: int | None,
    callbacks: Sequence[Callback],
    progress_bar: bool,
) -> pd.DataFrame:
    """Train `vae` in place; returns the history. Leaves it in eval mode.

    `first_epoch` counts the epochs before this call: training on shuffles and draws anew.
    """
    module = TrainingPlan(vae, plan)
    train, validation = split(data.label, train_size, split_seed)
    loaders = [training_loader(data.subset(train), batch_size, seed, first_epoch)]
    if len(validation):
        loaders.append(ordered_loader(data.subset(validation), batch_size))
    own = [ProgressBar()] if progress_bar else []
    if early_stopping is not None:
        if not len(validation):
            raise InputError("early_stopping needs held-out cells; lower train_size")
        own.append(EarlyStopping("elbo_validation", mode="max", patience=early_stopping))
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_quiet_lightning())
        torch.manual_seed(seed + first_epoch)
        trainer = make_trainer(max_epochs, [*own, *callbacks])
        stack.enter_context(_stop_on_interrupt(trainer))
        stack.callback(vae.eval)
        module.train()  # Lightning keeps the mode that it finds
        trainer.fit(module, *loaders)
    return module.history()


def make_trainer(max_epochs: int, callbacks: Sequence[Callback]) -> lightning.Trainer:
    """A Trainer that writes nothing by itself."""
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


@contextmanager
def _stop_on_interrupt(trainer: lightning.Trainer) -> Iterator[None]:
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
def _quiet_lightning() -> Iterator[None]:
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

"""The objective as a Lightning module: steps, scores, history, checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import pyro
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_scanvi.data.minibatches import Cells, alone
from pyro_scanvi.model.contracts import BROKEN, explained
from pyro_scanvi.model.objective import ObjectiveParts
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.training import checkpoints, nonfinite
from pyro_scanvi.training.nonfinite import Fault, NonFiniteError, first_fault
from pyro_scanvi.training.phases import TRAINING, Phase
from pyro_scanvi.training.ranks import ALONE, Processes, gathering
from pyro_scanvi.training.scores import EpochScores
from pyro_scanvi.training.settings import Plan


class LightningObjective(lightning.LightningModule):
    """Runs the objective of a phase under Lightning and keeps the history.

    Parameters
    ----------
    vae
        The model to train.
    plan
        How.
    phase
        Which objective, and what its splits are called.
    first_epoch
        Number of epochs before this phase.
    rows
        History before this phase, which appends to it.
    identity
        What a run that resumes this one must share; kept in checkpoints.
    classified
        From an epoch to the mask of the training cells that count in the classification term in
        it; None is all.
    processes
        Those that train.
    """

    def __init__(
        self,
        vae: SCANVAE,
        plan: Plan,
        phase: Phase = TRAINING,
        first_epoch: int = 0,
        rows: list[dict[str, Any]] | None = None,
        identity: Mapping[str, Any] | None = None,
        classified: Callable[[int], np.ndarray] | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__()
        self.vae, self.plan, self.phase = vae, plan, phase
        self.bound = phase.bind(vae, plan)
        self.first_epoch = first_epoch
        self.rows = [] if rows is None else rows
        self.identity = dict(identity or {})
        self.resumed: dict[str, Any] = {}
        self.scheduler: ReduceLROnPlateau | None = None
        self.latest: dict[str, float] = {}  # scores of the epoch, as callbacks call them
        self.noted: dict[str, float] = {}  # by callbacks, for the history of the training cells
        self.classified, self.processes = classified, processes

    @property
    def epoch(self) -> int:
        """The epoch in the history of the model, from 0."""
        return self.first_epoch + self.current_epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimiser over the parameters that are to be trained."""
        optimizer = self.plan.make_optimizer(self.vae.parameters())
        if self.plan.reduce_lr_on_plateau and self.phase.watched:
            scored_every = self.trainer.check_val_every_n_epoch or 1
            self.scheduler = self.plan.make_scheduler(optimizer, scored_every)
            self.scheduler.load_state_dict(self.resumed.get("scheduler", {}))
        return optimizer

    def on_train_start(self) -> None:
        """Do not go on where early stopping had ended the run."""
        self.trainer.should_stop = self.resumed.get("stopped", False)

    def on_train_epoch_start(self) -> None:
        """Go on with the random state of a checkpoint, and draw who is classified."""
        if "random_state" in self.resumed:
            first, others = self.resumed.pop("random_state"), self.resumed.get("of_others", [])
            checkpoints.set_random_state([first, *others][self.processes.rank])
        if self.classified is not None:
            self.classified_now = torch.from_numpy(self.classified(self.epoch)).to(self.device)
        self.train_scores = EpochScores()

    def training_step(self, cells: Cells) -> torch.Tensor:
        """Loss of a minibatch."""
        if self.bound.kl_weight is not None:
            self.bound.kl_weight = self.plan.kl_weight(self.current_epoch, self.global_step)
        if self.classified is not None:
            cells = replace(cells, classified=self.classified_now[cells.index])
        weight, cells = self.processes.joined(cells)
        parts = self._parts(cells)
        self.train_scores.add(parts, cells)
        return weight * parts.loss

    def on_validation_epoch_start(self) -> None:
        """Score afresh."""
        self.validation_scores = EpochScores()

    def validation_step(self, cells: Cells) -> None:
        """Score a minibatch of held-out cells."""
        self.validation_scores.add(self._parts(cells), cells)

    def on_validation_epoch_end(self) -> None:
        """Log the scores under the names that callbacks monitor, such as `elbo_validation`."""
        self._close_epoch(self.phase.held_out, self.validation_scores)

    def on_train_epoch_end(self) -> None:
        """Log the scores of the epoch's training minibatches, in training mode."""
        self._close_epoch(self.phase.name, self.train_scores, self.noted)
        self.noted = {}
        # Lightning would do so after the checkpoint, and a resumed run would not.
        watched = self.latest.pop(self.plan.lr_scheduler_metric, None)
        if self.scheduler is not None and watched is not None:
            self.scheduler.step(watched)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an epoch depends on beside weights and optimiser."""
        reasons = [c.stopping_reason for c in self.trainer.early_stopping_callbacks]
        first, *others = self.processes.each(checkpoints.random_state())
        checkpoint[checkpoints.KEY] = {
            "identity": self.identity,
            "phase": self.phase.name,
            "first_epoch": self.first_epoch,
            "history": self.rows,
            "random_state": first,
            "of_others": others,
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "stopped": any(reason != EarlyStoppingReason.NOT_STOPPED for reason in reasons),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the history; the rest waits for what it belongs to."""
        self.resumed = dict(checkpoint[checkpoints.KEY])
        self.rows[:] = self.resumed["history"]

    def diagnose(self, quantity: str) -> NonFiniteError:
        """What is not finite for the last minibatch; see :mod:`pyro_scanvi.training.nonfinite`.

        All processes ask together, and say the same: what the first of them found.
        """
        faults = self.processes.each(self._fault())
        return self._non_finite(quantity, max(faults, key=lambda fault: bool(fault.site)))

    def _fault(self) -> Fault:
        """Of the cells of this process."""
        torch.set_rng_state(self.last_random_state)  # of the CPU; a GPU's would be slow to keep
        story, cells = self.phase.story(self.vae), replace(self.last_cells, pooled=alone)
        with gathering(self.vae, None):
            fault = first_fault(story.model, story.guide, cells)
        fault.cells = np.sort(cells.position.cpu().numpy()[fault.cells])
        return fault

    def _non_finite(self, quantity: str, fault: Fault) -> NonFiniteError:
        parameters = nonfinite.bad_gradients(self.vae)
        return NonFiniteError(quantity, self.epoch, fault, parameters, self.trainer.validating)

    def _parts(self, cells: Cells) -> ObjectiveParts:
        self.last_cells, self.last_random_state = cells, torch.get_rng_state()
        # The first step of an epoch checks shapes and values; the others save the time.
        checking = self.train_scores.n_cells == 0
        try:
            with pyro.validation_enabled(checking):
                parts = self.bound.parts(cells)
        except BROKEN as error:  # Pyro's own check, or torch, which cannot say where
            self._refuse_non_finite()
            story = self.phase.story(self.vae)
            cells = replace(cells, pooled=alone)
            with gathering(self.vae, None):  # the others may be fine
                said = explained(error, self.vae, story.model, story.guide, cells)
            if said is error:
                raise
            raise said from error
        if not self.processes.all(parts.loss.isfinite()):
            raise self.diagnose("loss")
        return parts

    def _refuse_non_finite(self) -> None:
        fault = self._fault()
        if fault.site:
            raise self._non_finite("loss", fault)

    def _close_epoch(
        self, split: str, scores: EpochScores, noted: dict[str, float] | None = None
    ) -> None:
        if not scores.n_cells:  # interrupted before the first minibatch
            return
        scores = EpochScores.of_all(self.processes.each(scores))
        means = scores.mean() | (noted or {})
        self.rows.append({"epoch": self.epoch, "split": split} | means)
        logged = {f"{key}_{split}": value for key, value in means.items()}
        self.latest |= logged
        self.log_dict(logged)

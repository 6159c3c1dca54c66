"""How the objective is minimised: its weights, their schedule, the optimiser and its schedule."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_flags,
    check_known,
    check_not_negative,
    check_positive,
    look_up,
    make_plain,
)

OPTIMIZERS = {"Adam": partial(Adam, fused=True), "AdamW": partial(AdamW, fused=True)}
CHECKS = {float: check_not_negative, int: partial(check_at_least, 0), bool: check_flags}
RISING = ("elbo", "accuracy", "macro_f1")  # metrics that training raises; it lowers the others
FALLING = ("reconstruction", "cross_entropy", "calibration_error")


@dataclass(frozen=True)
class Plan:
    """How the objective is minimised.

    Attributes
    ----------
    lr, weight_decay, eps
        Of the optimiser; learning rate per step.
    optimizer
        "Adam" or "AdamW", or a callable from parameters to a torch optimiser, which then chooses
        its own lr, weight_decay and eps.
    classification_ratio
        Weight of the cross-entropy against the ELBO of one cell.
    feed_labels
        Condition the ELBO on known labels (the paper), or marginalise them (scvi-tools).
    n_epochs_kl_warmup, n_steps_kl_warmup
        Epochs, or optimiser steps, over which the KL weight rises from `min_kl_weight` to
        `max_kl_weight`; with neither it is `max_kl_weight` from the first step.
    min_kl_weight, max_kl_weight
        Ends of that rise.
    gradient_clip_norm
        Scale a gradient of a larger 2-norm down to this; None never does.
    reduce_lr_on_plateau
        Multiply the learning rate by `lr_factor` when `lr_scheduler_metric` has not improved by
        `lr_threshold` for more than `lr_patience` epochs, down to `lr_min`.
    lr_scheduler_metric
        A column of the history and a split, such as "elbo_validation".
    """

    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 0.01
    optimizer: str | Callable[[Iterable[Parameter]], Optimizer] = "Adam"
    classification_ratio: float = 50.0
    feed_labels: bool = True
    n_epochs_kl_warmup: int = 0
    n_steps_kl_warmup: int = 0
    min_kl_weight: float = 0.0
    max_kl_weight: float = 1.0
    gradient_clip_norm: float | None = None
    reduce_lr_on_plateau: bool = False
    lr_factor: float = 0.6
    lr_patience: int = 30
    lr_threshold: float = 0.0
    lr_scheduler_metric: str = "elbo_validation"
    lr_min: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Plan":
        """A plan with these settings; TypeError for an unknown one, naming the nearest."""
        if not isinstance(settings, Mapping):
            raise InputError(f"plan_kwargs={settings!r}, expected a dict")
        check_known(settings, [f.name for f in fields(cls)], "a field of the training plan")
        return cls(**settings)

    def __post_init__(self):
        make_plain(self)
        for field in fields(self):
            if field.type in CHECKS:
                CHECKS[field.type](**{field.name: getattr(self, field.name)})
        if not callable(look_up(OPTIMIZERS, self.optimizer, "optimizer")):
            raise InputError(f"optimizer={self.optimizer!r}, expected a name or a callable")
        if self.gradient_clip_norm is not None:
            check_positive(gradient_clip_norm=self.gradient_clip_norm)
        if self.n_epochs_kl_warmup and self.n_steps_kl_warmup:
            raise InputError("n_epochs_kl_warmup and n_steps_kl_warmup exclude each other")
        if not 0 < self.lr_factor < 1:
            raise InputError(f"lr_factor={self.lr_factor}, expected a number between 0 and 1")

        metric, _, split = str(self.lr_scheduler_metric).rpartition("_")
        if metric not in RISING + FALLING or split not in ("train", "validation"):
            raise InputError(
                f"lr_scheduler_metric={self.lr_scheduler_metric!r}, expected one of "
                f"{', '.join(RISING + FALLING)} and '_train' or '_validation'"
            )

    @property
    def watches_validation(self) -> bool:
        """Whether the learning rate depends on held-out cells."""
        return self.reduce_lr_on_plateau and self.lr_scheduler_metric.endswith("_validation")

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them; a callable by its name."""
        named = {} if isinstance(self.optimizer, str) else {"optimizer": _name(self.optimizer)}
        return asdict(self) | named

    def objective(self, vae: SCANVAE) -> SemiSupervisedELBO:
        """The objective of this plan for a model."""
        return SemiSupervisedELBO(vae.q_y, self.classification_ratio, self.feed_labels)

    def kl_weight(self, epoch: int, step: int = 0) -> float:
        """KL weight in an epoch and optimiser step, both counted from 0."""
        length = self.n_epochs_kl_warmup or self.n_steps_kl_warmup
        done = (epoch if self.n_epochs_kl_warmup else step) + 1
        rise = min(done / length, 1.0) if length else 1.0
        return self.min_kl_weight + rise * (self.max_kl_weight - self.min_kl_weight)

    def make_optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimiser of those parameters that are to be trained."""
        trained = [p for p in parameters if p.requires_grad]
        make = look_up(OPTIMIZERS, self.optimizer, "optimizer")
        if make is self.optimizer:
            return make(trained)
        return make(trained, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)

    def make_scheduler(self, optimizer: Optimizer, scored_every: int = 1) -> ReduceLROnPlateau:
        """Lowers the learning rate where the metric stands still.

        Parameters
        ----------
        optimizer
            Whose learning rate.
        scored_every
            Epochs between two scorings of the held-out cells; the patience counts epochs.
        """
        seen_every = scored_every if self.watches_validation else 1
        return ReduceLROnPlateau(
            optimizer,
            mode="max" if self.lr_scheduler_metric.startswith(RISING) else "min",
            factor=self.lr_factor,
            patience=self.lr_patience // seen_every,  # it takes one more to be over
            threshold=self.lr_threshold,
            threshold_mode="abs",
            min_lr=self.lr_min,
        )


def _name(part: Callable) -> str:
    if isinstance(part, partial):
        given = [f"{name}={value!r}" for name, value in part.keywords.items()]
        return f"{_name(part.func)}({', '.join(given)})"
    return getattr(part, "__qualname__", type(part).__qualname__)

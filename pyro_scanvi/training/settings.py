"""The settings of a run: of the objective, of the way through the data, of Lightning's Trainer."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_scanvi.model.objective import Bound
from pyro_scanvi.model.objectives import ELBO, Objective
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.training.ranks import ALONE, Processes, launched
from pyro_scanvi.training.trainer import free_arguments
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_flags,
    check_known,
    check_not_negative,
    check_positive,
    check_seed,
    is_number,
    look_up,
    make_plain,
)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": partial(Adam, fused=True),
    "AdamW": partial(AdamW, fused=True),
}
CHECKS: dict[Any, Callable[..., None]] = {
    float: check_not_negative,
    int: partial(check_at_least, 0),
    bool: check_flags,
}
RISING = ("elbo", "accuracy", "macro_f1")  # metrics that training raises; it lowers the others
FALLING = ("reconstruction", "cross_entropy", "calibration_error")
TRAIN, VALIDATION = "train", "validation"  # splits whose scores a plan may watch
STRATEGIES: dict[str, Callable[..., Processes]] = {"auto": lambda _: ALONE, "ddp": launched}
PRECISIONS = ("32-true", "64-true", "bf16-mixed")
PLAIN = (str, int, float, bool, complex, type(None))
COMPUTING = ("accumulate_grad_batches", "limit_train_batches", "limit_val_batches")


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
        Weight of the cross-entropy against the ELBO of one cell; with ``Layered()`` it moves the
        classifier alone.
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
    objective
        What is minimised: a part that is called with a model and this plan; None is
        :class:`~pyro_scanvi.model.objectives.ELBO`. Given to ``train``, not in `plan_kwargs`.
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
    objective: Objective | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], objective: Objective | None = None) -> "Plan":
        """A plan with these settings; TypeError for an unknown one, naming the nearest."""
        if not isinstance(settings, Mapping):
            raise InputError(f"plan_kwargs={settings!r}, expected a dict")
        known = [f.name for f in fields(cls) if f.name != "objective"]
        check_known(settings, known, "a field of the training plan")
        return cls(**settings, objective=objective)

    def __post_init__(self):
        make_plain(self)
        for setting in fields(self):
            if setting.type in CHECKS:
                CHECKS[setting.type](**{setting.name: getattr(self, setting.name)})
        if not callable(look_up(OPTIMIZERS, self.optimizer, "optimizer")):
            raise InputError(f"optimizer={self.optimizer!r}, expected a name or a callable")
        if not (self.objective is None or callable(self.objective)):
            raise InputError(
                f"objective={self.objective!r}, expected a callable from the model and the plan to "
                "a bound objective, such as ELBO(num_particles=5) or IWAE()"
            )
        if self.gradient_clip_norm is not None:
            check_positive(gradient_clip_norm=self.gradient_clip_norm)
        if self.n_epochs_kl_warmup and self.n_steps_kl_warmup:
            raise InputError("n_epochs_kl_warmup and n_steps_kl_warmup exclude each other")
        if not 0 < self.lr_factor < 1:
            raise InputError(f"lr_factor={self.lr_factor}, expected a number between 0 and 1")

        metric, _, split = str(self.lr_scheduler_metric).rpartition("_")
        if metric not in RISING + FALLING or split not in (TRAIN, VALIDATION):
            raise InputError(
                f"lr_scheduler_metric={self.lr_scheduler_metric!r}, expected one of "
                f"{', '.join(RISING + FALLING)} and '_{TRAIN}' or '_{VALIDATION}'"
            )

    @property
    def watches_validation(self) -> bool:
        """Whether the learning rate depends on held-out cells."""
        return self.reduce_lr_on_plateau and self.lr_scheduler_metric.endswith(f"_{VALIDATION}")

    @property
    def changes_kl_weight(self) -> bool:
        """Whether the KL weight is another than 1 at any step."""
        warm_up = self.n_epochs_kl_warmup or self.n_steps_kl_warmup
        return bool(warm_up) or self.max_kl_weight != 1

    @property
    def hides_labels(self) -> bool:
        """Whether no label moves the encoder."""
        return getattr(self.objective, "hides_labels", False)

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them; a callable by its name, with its settings.

        ELBO() is not among them, as in records of before there were other objectives.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.optimizer):
            settings["optimizer"] = _name(self.optimizer)
        if settings.pop("objective") not in (None, ELBO()):
            settings["objective"] = described(self.objective)
        return settings

    def bind(self, vae: SCANVAE) -> Bound:
        """The objective of this plan, bound to a model."""
        return (self.objective or ELBO())(vae, self)

    def kl_weight(self, epoch: int, step: int = 0) -> float:
        """KL weight in an epoch and optimiser step, both counted from 0."""
        length = self.n_epochs_kl_warmup or self.n_steps_kl_warmup
        done = (epoch if self.n_epochs_kl_warmup else step) + 1
        rise = min(done / length, 1.0) if length else 1.0
        return self.min_kl_weight + rise * (self.max_kl_weight - self.min_kl_weight)

    def make_optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimiser of those parameters that are to be trained."""
        trained = [p for p in parameters if p.requires_grad]
        if callable(self.optimizer):
            return self.optimizer(trained)
        make = OPTIMIZERS[self.optimizer]
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


@dataclass(frozen=True)
class DataSettings:
    """How training goes through the data.

    Attributes
    ----------
    max_epochs
        Passes over the data.
    pretrain_epochs
        Passes before them without labels; see :mod:`pyro_scanvi.model.unsupervised`.
    train_size, validation_size
        Shares of the cells to train on and to score; a `validation_size` of None is the rest.
    batch_size
        Cells in a minibatch, of each process where several train.
    n_samples_per_label
        At most so many cells of each label, drawn anew in each epoch, count in the classification
        term; None is all.
    class_balanced
        Draw labelled cells so that each label is seen equally often.
    early_stopping
        Stop when the held-out ELBO has not risen for so many epochs, or at the first scoring
        after them; None is never.
    check_val_every_n_epoch
        Score the held-out cells every so many epochs.
    seed
        Of shuffling, dropout and sampling.
    split_seed
        Of the split into cells to train on and cells to score.
    """

    max_epochs: int
    pretrain_epochs: int = 0
    train_size: float = 0.9
    validation_size: float | None = None
    batch_size: int = 128
    n_samples_per_label: int | None = None
    class_balanced: bool = False
    early_stopping: int | None = None
    check_val_every_n_epoch: int = 1
    seed: int = 0
    split_seed: int = 0

    def __post_init__(self):
        make_plain(self)
        check_seed(self.seed)
        check_at_least(0, max_epochs=self.max_epochs, pretrain_epochs=self.pretrain_epochs)
        check_at_least(
            1, batch_size=self.batch_size, check_val_every_n_epoch=self.check_val_every_n_epoch
        )
        if self.n_samples_per_label is not None:
            check_at_least(1, n_samples_per_label=self.n_samples_per_label)
        if self.early_stopping is not None:
            check_at_least(0, early_stopping_patience=self.early_stopping)
        check_flags(class_balanced=self.class_balanced)
        if not (is_number(self.train_size) and 0 < self.train_size <= 1):
            raise InputError(f"train_size={self.train_size!r}, expected a share in (0, 1]")
        held_out, most = self.validation_size, 1 - self.train_size
        if held_out is not None and not (is_number(held_out) and 0 <= held_out <= most + 1e-9):
            raise InputError(
                f"validation_size={held_out!r}, expected a share of at most 1 - train_size = "
                f"{most:.6g}"
            )

    @property
    def early_stopping_scorings(self) -> int | None:
        """After how many scorings without a rise the patience is over; they may be seldom."""
        if self.early_stopping is None:
            return None
        return -(-self.early_stopping // self.check_val_every_n_epoch)

    @property
    def scores(self) -> bool:
        """Whether held-out cells are ever scored; of no epochs none could be."""
        return not 0 < self.max_epochs < self.check_val_every_n_epoch


@dataclass(frozen=True)
class TrainerSettings:
    """How Lightning runs; what of it changes the numbers is told by :meth:`computing`.

    Attributes
    ----------
    callbacks, logger
        Lightning's, beside our own.
    accelerator, devices, precision
        As for Lightning's Trainer; one device, or with "ddp" those of this machine.
    strategy
        "auto" is one process; "ddp" those that a launcher has started.
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
    strategy: str = "auto"
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
        self.processes()
        check_flags(progress_bar=self.progress_bar)
        _check_all(Callback, callbacks=self.callbacks)
        if self.logger not in (None, True, False):
            given = self.logger if isinstance(self.logger, Sequence) else [self.logger]
            _check_all(Logger, logger=given)
        if not isinstance(self.trainer_kwargs, Mapping):
            raise InputError(f"trainer_kwargs={self.trainer_kwargs!r}, expected a dict")
        check_known(self.trainer_kwargs, free_arguments(), "a free argument of Lightning's Trainer")

    def processes(self) -> Processes:
        """Those that train; InputError where no launcher has started them."""
        return look_up(STRATEGIES, self.strategy, "strategy")(self.devices)

    @property
    def scores(self) -> bool:
        """Whether the Trainer looks at held-out cells."""
        return self.trainer_kwargs.get("limit_val_batches") != 0

    @property
    def counts_steps(self) -> bool:
        """Whether the run ends after some optimiser steps."""
        return self.trainer_kwargs.get("max_steps", -1) != -1

    def computing(self) -> dict[str, Any]:
        """What a run that resumes one with these settings must share."""
        given = {k: self.trainer_kwargs[k] for k in COMPUTING if k in self.trainer_kwargs}
        n = self.processes().n
        together = {"processes": n} if n > 1 else {}  # nothing, as before there were several
        return {"precision": self.precision} | given | together

    def _check_devices(self) -> None:
        index = isinstance(self.devices, list | tuple) and len(self.devices) == 1
        if self.strategy == "auto" and not index and self.devices not in ("auto", 1, "1"):
            raise InputError(
                f"devices={self.devices!r}, expected 'auto', 1 or a list of one index: training "
                "runs on one device, but with strategy='ddp' (docs/many_machines.md)"
            )


def default_max_epochs(n_cells: int) -> int:
    """scvi-tools' 400, fewer above 20,000 cells, but 150 at most."""
    return max(1, min(round(20_000 / n_cells * 400), 150))


def _check_all(kind: type, **given: Any) -> None:
    """Refuse what is no list of instances of Lightning's."""
    for name, members in given.items():
        if not isinstance(members, Sequence) or not all(isinstance(m, kind) for m in members):
            raise InputError(f"{name}={members!r}, expected a list of Lightning's {kind.__name__}s")


def described(part: Any) -> str:
    """The name of an objective, with the settings of a dataclass, a partial, or a plain object.

    It is text to compare and to read: the same in every process, and nothing is imported by it.
    """
    if isinstance(part, partial):
        given = [*map(described, part.args), *_settings(part.keywords)]
        return f"{described(part.func)}({', '.join(given)})"
    if hasattr(part, "__qualname__"):
        return _qualified(part)
    if isinstance(part, PLAIN):
        return repr(part)
    if isinstance(part, Set):
        return f"{{{', '.join(sorted(map(described, part)))}}}"
    if isinstance(part, Sequence):
        return f"({', '.join(map(described, part))})"
    if hasattr(part, "tolist"):  # of numpy, of torch
        return repr(part.tolist())
    return f"{type(part).__qualname__}({', '.join(_settings(_told_by(part)))})"


def _told_by(part: Any) -> dict[str, Any]:
    """Its fields; of what is no dataclass the attributes that are plain."""
    if is_dataclass(part):
        return {f.name: getattr(part, f.name) for f in fields(part)}
    return {k: v for k, v in getattr(part, "__dict__", {}).items() if isinstance(v, PLAIN)}


def _qualified(part: Any) -> str:
    """Of a method its own class or object, which its name does not tell."""
    owner = getattr(part, "__self__", None)
    is_bound = owner is not None and not inspect.ismodule(owner)
    return f"{described(owner)}.{part.__name__}" if is_bound else part.__qualname__


def _settings(known: Mapping[str, Any]) -> list[str]:
    return [f"{name}={described(value)}" for name, value in known.items()]


def _name(part: Callable) -> str:
    if isinstance(part, partial):
        given = [f"{name}={value!r}" for name, value in part.keywords.items()]
        return f"{_name(part.func)}({', '.join(given)})"
    return getattr(part, "__qualname__", type(part).__qualname__)

"""Settings to compare, by name: rows for :func:`~.comparing.compare`.

Each is a plain dict; a row of one's own is ``OPTIMISERS | {"mine": Settings(...)}``. The row
"default" is the baseline: the paper's ELBO, and what else the estimator does unless told.
"""

from functools import partial

from pyro.infer import TraceEnum_ELBO
from pyro.optim.clipped_adam import ClippedAdam
from torch.optim import SGD

from pyro_scanvi.experiments.comparing import DEFAULT, Settings
from pyro_scanvi.model.objectives import ELBO, IWAE, Layered, PyroLoss, Renyi


def plan(**settings: object) -> Settings:
    """A row that differs in fields of the plan."""
    return Settings(train={"plan_kwargs": settings})


OBJECTIVES: dict[str, Settings] = {
    "default": DEFAULT,
    "layered": Settings(train={"objective": Layered()}),
    "sampled KLs": Settings(train={"objective": ELBO(closed_form=())}),
    "5 particles": Settings(train={"objective": ELBO(num_particles=5)}),
    "IWAE, 5": Settings(train={"objective": IWAE(5)}),
    "IWAE, 5, y expected": Settings(train={"objective": IWAE(5, sum_labels=False)}),
    "Renyi 0.5, 5, y expected": Settings(train={"objective": Renyi(0.5, 5, sum_labels=False)}),
    "TraceEnum_ELBO": Settings(train={"objective": PyroLoss(TraceEnum_ELBO(max_plate_nesting=1))}),
}
OPTIMISERS: dict[str, Settings] = {
    "default": DEFAULT,
    "Adam, lr 1e-3": plan(lr=1e-3),
    "Adam, lr 2e-2": plan(lr=2e-2),
    "Adam, eps 1e-8": plan(eps=1e-8),
    "AdamW, decay 1e-2": plan(optimizer="AdamW", weight_decay=1e-2),
    "ClippedAdam, lr 5e-3": plan(optimizer=partial(ClippedAdam, lr=5e-3)),
    "SGD, momentum": plan(optimizer=partial(SGD, lr=1e-4, momentum=0.9), gradient_clip_norm=100.0),
    "gradient norm 10": plan(gradient_clip_norm=10.0),
    "lr 2e-2, plateau": plan(
        lr=2e-2, reduce_lr_on_plateau=True, lr_scheduler_metric="elbo_train", lr_patience=1
    ),
}
WARM_UPS: dict[str, Settings] = {
    "default": DEFAULT,
    "5 epochs": plan(n_epochs_kl_warmup=5),
    "20 epochs": plan(n_epochs_kl_warmup=20),
    "KL weight 0.1": plan(max_kl_weight=0.1),
    "pretrained, 5": Settings(train={"pretrain_epochs": 5}),
}
MINIBATCHES: dict[str, Settings] = {
    "default": DEFAULT,
    **{str(n): Settings(train={"batch_size": n}) for n in (32, 64, 256)},
}
REGULARISATION: dict[str, Settings] = {
    "default": DEFAULT,
    "dropout 0": Settings({"dropout_rate": 0.0}),
    "dropout 0.1": Settings({"dropout_rate": 0.1}),
    "no batch norm": Settings({"use_batch_norm": "none"}),
    "batch norm in encoders": Settings({"use_batch_norm": "encoder"}),
    "layer norm": Settings({"use_batch_norm": "none", "use_layer_norm": "both"}),
}
TABLES: dict[str, dict[str, Settings]] = {
    "objectives": OBJECTIVES,
    "optimisers": OPTIMISERS,
    "warm-ups": WARM_UPS,
    "minibatches": MINIBATCHES,
    "regularisation": REGULARISATION,
}

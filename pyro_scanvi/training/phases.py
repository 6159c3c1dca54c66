"""The phases of a run, in their order: names, epochs, objectives, and what of them counts."""

from collections.abc import Callable
from dataclasses import dataclass

from pyro_scanvi.model.objective import BoundModule
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.model.unsupervised import Unsupervised
from pyro_scanvi.training.settings import WATCHED, DataSettings, Plan


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with an objective of its own; a run goes through `PHASES` in turn.

    Attributes
    ----------
    name
        In checkpoints, and in the history the split of its training cells.
    held_out
        In the history the split of its held-out cells.
    n_epochs
        How many epochs the settings give it; it is left out where they are none.
    bind
        Its objective, bound to the model, as the plan weighs it.
    watched
        Whether its scores are acted on: by early stopping, by the schedule of the learning rate
        and by callbacks of the user.
    learns_labels
        Whether the model answers after an epoch of it.
    """

    name: str
    held_out: str
    n_epochs: Callable[[DataSettings], int]
    bind: Callable[[SCANVAE, Plan], BoundModule]
    watched: bool = False
    learns_labels: bool = False


def _unsupervised(vae: SCANVAE, plan: Plan) -> BoundModule:
    story = Unsupervised(vae)
    return story.objective()(story.model, story.guide)


def _semi_supervised(vae: SCANVAE, plan: Plan) -> BoundModule:
    return plan.objective(vae)(vae.model, vae.guide)


WARM_START = Phase(
    "pretrain", "pretrain_validation", lambda settings: settings.pretrain_epochs, _unsupervised
)
TRAINING = Phase(
    *WATCHED,
    lambda settings: settings.max_epochs,
    _semi_supervised,
    watched=True,
    learns_labels=True,
)
PHASES = (WARM_START, TRAINING)

"""The phases of a run, in their order: names, epochs, objectives, and what of them counts."""

from collections.abc import Callable
from dataclasses import dataclass

from pyro_scanvi.model.objective import Bound
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.model.unsupervised import Unsupervised
from pyro_scanvi.training.settings import TRAIN, VALIDATION, DataSettings, Plan


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
    story
        Model and guide, where one looks for what is not finite.
    """

    name: str
    held_out: str
    n_epochs: Callable[[DataSettings], int]
    bind: Callable[[SCANVAE, Plan], Bound]
    watched: bool = False
    learns_labels: bool = False
    story: Callable[[SCANVAE], SCANVAE | Unsupervised] = lambda vae: vae


def _unsupervised(vae: SCANVAE, plan: Plan) -> Bound:
    """The ELBO of scVI, whatever the objective of the plan."""
    story = Unsupervised(vae)
    return story.objective()(story.model, story.guide)


def _of_the_plan(vae: SCANVAE, plan: Plan) -> Bound:
    return plan.bind(vae)


WARM_START = Phase(
    "pretrain",
    "pretrain_validation",
    lambda settings: settings.pretrain_epochs,
    _unsupervised,
    story=Unsupervised,
)
TRAINING = Phase(
    TRAIN,
    VALIDATION,
    lambda settings: settings.max_epochs,
    _of_the_plan,
    watched=True,
    learns_labels=True,
)
PHASES = (WARM_START, TRAINING)

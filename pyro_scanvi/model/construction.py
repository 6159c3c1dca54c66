"""From the arguments of a SCANVAE to its networks: checks, widths, norms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_scanvi import validation
from pyro_scanvi.model import arguments
from pyro_scanvi.model.likelihoods import GENE_LIKELIHOODS, GeneLikelihood
from pyro_scanvi.model.networks import (
    Classifier,
    CovariateEncoder,
    GroupedClassifier,
    HiddenLayers,
    NormalNetwork,
)

ENCODER_VAR_EPS = 1e-4
EMBEDDING_DIM = 5
NORM_PLACES = {  # whether encoders and decoders have the norm
    "encoder": (True, False),
    "decoder": (False, True),
    "both": (True, True),
    "none": (False, False),
}
LATENT_TRANSFORMS = {"normal": nn.Identity, "ln": lambda: nn.Softmax(-1)}
BATCH_REPRESENTATIONS = {"one-hot": False, "embedding": True}


@dataclass(frozen=True)
class DataSizes:
    """Numbers of genes, batches, labels and covariates; see :class:`~pyro_scanvi.SCANVAE`."""

    n_input: int
    n_batch: int
    n_labels: int
    n_continuous_cov: int
    n_cats_per_cov: tuple[int, ...]

    def __post_init__(self):
        validation.check_at_least(1, n_input=self.n_input)
        validation.check_at_least(0, n_batch=self.n_batch, n_continuous_cov=self.n_continuous_cov)
        validation.check_at_least(2, n_labels=self.n_labels)
        counts = {f"n_cats_per_cov[{i}]": n for i, n in enumerate(self.n_cats_per_cov)}
        validation.check_at_least(1, **counts)


@dataclass(frozen=True)
class Layers:
    """Makes the hidden layers of all networks of a model, alike in width, depth and norms.

    Attributes
    ----------
    n_hidden, n_layers
        Units of a layer, number of layers.
    dropout_rate
        Of encoders; decoders have no dropout.
    use_batch_norm, use_layer_norm
        "encoder", "decoder", "both" or "none".
    """

    n_hidden: int
    n_layers: int
    dropout_rate: float
    use_batch_norm: str
    use_layer_norm: str

    def __post_init__(self):
        validation.check_at_least(1, n_hidden=self.n_hidden)
        validation.check_at_least(0, n_layers=self.n_layers)
        validation.check_rate(dropout_rate=self.dropout_rate)
        self._norms(0)

    def encoder(self, n_in: int, **changes: Any) -> HiddenLayers:
        """Hidden layers of an encoder or of the classifier; `changes` as in HiddenLayers."""
        return self._hidden(n_in, 0, {"dropout_rate": self.dropout_rate} | changes)

    def decoder(self, n_in: int, **changes: Any) -> HiddenLayers:
        """Hidden layers of a decoder."""
        return self._hidden(n_in, 1, changes)

    def _hidden(self, n_in: int, place: int, changes: Mapping[str, Any]) -> HiddenLayers:
        batch_norm, layer_norm = self._norms(place)
        settings: dict[str, Any] = {
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "batch_norm": batch_norm,
            "layer_norm": layer_norm,
        }
        return HiddenLayers(n_in, **{**settings, **changes})

    def _norms(self, place: int) -> tuple[bool, bool]:
        """Whether there is batch norm, and layer norm; place 0 are encoders, 1 decoders."""
        batch = validation.look_up(NORM_PLACES, self.use_batch_norm, "use_batch_norm")
        layer = validation.look_up(NORM_PLACES, self.use_layer_norm, "use_layer_norm")
        return batch[place], layer[place]


def latent_transform(latent_distribution: str) -> nn.Module:
    """From z to what classifier, u encoder and decoder see of it."""
    make = validation.look_up(LATENT_TRANSFORMS, latent_distribution, "latent_distribution")
    return make()


def covariate_encoder(
    sizes: DataSizes, representation: str, kwargs: Mapping[str, Any] | None
) -> CovariateEncoder:
    """How batch and further covariates join the inputs of networks."""
    embedded = validation.look_up(BATCH_REPRESENTATIONS, representation, "batch_representation")
    kwargs = dict(kwargs or {})
    validation.check_known(kwargs, ["embedding_dim"], "an argument of the batch embedding")
    validation.check_at_least(1, **kwargs)
    if kwargs and not embedded:
        raise validation.InputError("batch_embedding_kwargs needs batch_representation='embedding'")
    dim = kwargs.get("embedding_dim", EMBEDDING_DIM) if embedded else None
    return CovariateEncoder(
        max(sizes.n_batch, 1), sizes.n_cats_per_cov, sizes.n_continuous_cov, dim
    )


def encoder(
    hidden: HiddenLayers, n_out: int, var_activation: Callable[[Tensor], Tensor] = torch.exp
) -> NormalNetwork:
    """A posterior that cannot collapse to a point."""
    return NormalNetwork(hidden, n_out, var_activation, ENCODER_VAR_EPS)


def label_classifier(
    layers: Layers,
    n_latent: int,
    n_labels: int,
    changes: Mapping[str, Any] | None,
    linear: bool,
    groups: Tensor | None,
) -> Classifier | GroupedClassifier:
    """From z to one logit a label; with groups of labels their probabilities are multiplied."""
    settings = {"n_layers": 0} if linear else {}
    settings |= arguments.checked_classifier_parameters(changes)
    labels = Classifier(layers.encoder(n_latent, **settings), n_labels)
    if groups is None:
        return labels
    n_groups = int(groups.max()) + 1
    return GroupedClassifier(
        labels, Classifier(layers.encoder(n_latent, **settings), n_groups), groups
    )


def likelihood_of(gene_likelihood: str | GeneLikelihood | Callable) -> GeneLikelihood:
    """The part that a name, or a callable from parameters to a Distribution, stands for."""
    found = validation.look_up(GENE_LIKELIHOODS, gene_likelihood, "gene_likelihood")
    return found if isinstance(found, GeneLikelihood) else GeneLikelihood(found)


def library_priors(
    latent: bool,
    n_batch: int,
    means: Tensor | Sequence[float] | None,
    variances: Tensor | Sequence[float] | None,
) -> dict[str, Tensor]:
    """Mean and variance of the log library of each batch, by the names of their buffers."""
    given = {"library_log_means": means, "library_log_vars": variances}
    if not latent:
        needs = "a latent library; set use_observed_lib_size=False with it"
        arguments.check_absent(given, needs)
        return {}
    return {
        name: arguments.checked_library_prior(values, n_batch, name, name == "library_log_vars")
        for name, values in given.items()
    }


def check_one_size(size_factor: bool, observed: bool) -> None:
    """Refuse to be given the size of a cell and to infer it."""
    if size_factor and not observed:
        raise validation.InputError(
            "use_size_factor_key=True gives the size of each cell, use_observed_lib_size=False "
            "infers it; choose one"
        )

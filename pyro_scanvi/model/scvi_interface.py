"""To and from scvi-tools: its names of weights and arguments, its minibatches, its saved models.

scvi-tools is not needed for any of this. What differs: it writes (1, L) for the prior of the labels
and (1, S) for that of the library, genes before batches in the dispersion, and it owns every head,
used or not.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.distributions import Independent, LogNormal
from pyro.infer import Predictive
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.nn.functional import cross_entropy

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import UNLABELED, Cells
from pyro_scanvi.model.likelihoods import GeneLabelDispersion
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.scvi_tools import pickles
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.validation import InputError

# ---- minibatches and the objective ----------------------------------------------------------


@dataclass(frozen=True)
class LossRecord:
    """A loss in nats per cell and its parts, divided as scvi-tools divides them.

    ``loss = mean(reconstruction_loss + w * kl_local) + kl_global / N + r * classification_loss``
    with KL weight w and classification ratio r.

    Attributes
    ----------
    loss
        What is minimised, a scalar; the only part with a gradient, but for classification_loss.
    reconstruction_loss
        -log p(x | z, l) + log q(z | x) - E_q(y | z) log p(z | u, y) of each cell, (N,).
    kl_local
        KL of u, of y and of l of each cell, unweighted, (N,).
    kl_global
        KL of sites outside the plate of cells, a scalar.
    classification_loss
        Mean cross-entropy over the labelled cells, a scalar; 0 without ``labelled_tensors``.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    kl_local: Tensor
    kl_global: Tensor
    classification_loss: Tensor


def cells_from_tensors(vae: SCANVAE, tensors: Mapping[str, Tensor]) -> Cells:
    """A minibatch from scvi-tools' names; refuses what does not fit the model.

    Parameters
    ----------
    vae
        The model.
    tensors
        ``X`` (N, G), ``batch`` (N, 1), ``labels`` (N, 1), any code outside 0..L-1 being
        unlabelled, ``extra_continuous_covs`` (N, C), ``extra_categorical_covs`` (N, D),
        ``size_factor`` (N, 1).

    Raises
    ------
    ValueError
        If ``X`` is missing, or anything does not fit the model.
    """
    if "X" not in tensors:
        raise ValueError(f"tensors hold {', '.join(tensors) or 'nothing'}; expected X, the counts")
    return vae.cells(
        tensors["X"],
        tensors.get("batch"),
        tensors.get("labels"),
        cont_covs=tensors.get("extra_continuous_covs"),
        cat_covs=tensors.get("extra_categorical_covs"),
        size_factor=tensors.get("size_factor"),
    )


def loss(
    vae: SCANVAE,
    tensors: Mapping[str, Tensor],
    inference_outputs: Mapping[str, Any],
    feed_labels: bool = False,
    kl_weight: float = 1.0,
    labelled_tensors: Mapping[str, Tensor] | None = None,
    classification_ratio: float | None = None,
) -> LossRecord:
    """The objective of training at given samples of z and l; see :meth:`SCANVAE.loss`."""
    cells = cells_from_tensors(vae, tensors)
    objective = SemiSupervisedELBO(vae.q_y, feed_labels=feed_labels, kl_weight=kl_weight)
    if classification_ratio is None:
        classification_ratio = objective.classification_ratio
    objective.classification_ratio = 0.0  # the term comes from labelled_tensors, or not at all
    guide = _given_latents(vae, cells, inference_outputs)(vae.guide)
    parts = objective.parts(vae.model, guide, cells)
    kl = dict(parts.kl)
    kl_z = kl.pop("z")
    wrong = parts.loss.new_zeros(())
    if labelled_tensors is not None:
        wrong = _classification_loss(vae, cells_from_tensors(vae, labelled_tensors))
    return LossRecord(
        loss=parts.loss + classification_ratio * wrong,
        reconstruction_loss=parts.reconstruction + kl_z,
        kl_local=sum(kl.values()),
        kl_global=parts.kl_global,
        classification_loss=wrong,
    )


def sample(vae: SCANVAE, tensors: Mapping[str, Tensor], n_samples: int = 1) -> Tensor:
    """Posterior predictive draws of counts; see :meth:`SCANVAE.sample`."""
    validation.check_at_least(1, n_samples=n_samples)
    predictive = Predictive(
        _Unobserved("x")(vae.model),
        guide=vae.guide,
        num_samples=n_samples,
        return_sites=["x"],
        parallel=True,
    )
    counts = predictive(cells_from_tensors(vae, tensors))["x"].cpu()  # S, N, G
    return counts[0] if n_samples == 1 else counts.permute(1, 2, 0)


class _Unobserved(Messenger):
    """Draw one observed site anew."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.name:
            msg.update(value=None, is_observed=False, done=False)


class _Given(Messenger):
    """Take values, and where they are known the distributions they came from, as they are given.

    A guide in train mode would evaluate a sample under another dropout mask than it was drawn with.
    """

    def __init__(self, sites: Mapping[str, tuple[Tensor, Distribution | None]]):
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.sites:
            value, fn = self.sites[msg["name"]]
            msg.update(value=value, done=True, fn=msg["fn"] if fn is None else fn)


def _given_latents(vae: SCANVAE, cells: Cells, outputs: Mapping[str, Any]) -> _Given:
    """z, and l where it is latent, with their posteriors."""
    missing = [name for name in ("z", "library") if name not in outputs]
    if missing:
        raise ValueError(f"inference_outputs lack {' and '.join(missing)}; see SCANVAE.inference")
    validation.check_shape("z", outputs["z"], (len(cells), vae.n_latent))
    validation.check_shape("library", outputs["library"], (len(cells), 1))
    q_z, q_l = outputs.get("qz"), outputs.get("ql")
    sites = {"z": (outputs["z"], Independent(q_z, 1) if isinstance(q_z, Normal) else None)}
    if vae.latent_library:
        of_log = isinstance(q_l, Normal)
        q_l = Independent(LogNormal(q_l.loc, q_l.scale), 1) if of_log else None
        sites["l"] = (outputs["library"].exp(), q_l)
    return _Given(sites)


def _classification_loss(vae: SCANVAE, cells: Cells) -> Tensor:
    if not cells.labelled.any():
        raise ValueError(
            f"none of the {len(cells)} cells in labelled_tensors has a label in "
            f"0..{vae.n_labels - 1}; leave it out for a loss without a classification term"
        )
    logits = vae.q_y(vae.q_z(cells).mean).logits
    return cross_entropy(logits, cells.label, ignore_index=UNLABELED)


# ---- names and shapes of weights ------------------------------------------------------------

_NAMES = {  # ours: theirs
    "y_prior": "y_prior",
    "library_log_means": "library_log_means",
    "library_log_vars": "library_log_vars",
    "covariates.embedding": "_embeddings_dict.batch",
    "z_encoder.hidden.layers": "z_encoder.encoder.fc_layers",
    "z_encoder.mean": "z_encoder.mean_encoder",
    "z_encoder.variance": "z_encoder.var_encoder",
    "l_encoder.hidden.layers": "l_encoder.encoder.fc_layers",
    "l_encoder.mean": "l_encoder.mean_encoder",
    "l_encoder.variance": "l_encoder.var_encoder",
    "u_encoder.hidden.layers": "encoder_z2_z1.encoder.fc_layers",
    "u_encoder.mean": "encoder_z2_z1.mean_encoder",
    "u_encoder.variance": "encoder_z2_z1.var_encoder",
    "z_decoder.hidden.layers": "decoder_z1_z2.decoder.fc_layers",
    "z_decoder.mean": "decoder_z1_z2.mean_decoder",
    "z_decoder.variance": "decoder_z1_z2.var_decoder",
    "x_decoder.hidden.layers": "decoder.px_decoder.fc_layers",
    "x_decoder.expression": "decoder.px_scale_decoder",
    "x_decoder.gate": "decoder.px_dropout_decoder",
    "dispersion.head": "decoder.px_r_decoder",
    "dispersion.log_theta": "px_r",
    "classifier.hidden.layers": "classifier.classifier.0.fc_layers",
    "classifier.logits": "classifier.classifier.1",
    "classifier.labels.hidden.layers": "classifier.classifier.0.fc_layers",
    "classifier.labels.logits": "classifier.classifier.1",
    "classifier.groups.hidden.layers": "classifier_groups.classifier.0.fc_layers",
    "classifier.groups.logits": "classifier_groups.classifier.1",
    "classifier.group_of_label": "groups_index",
}
_PARTS_OF_A_LAYER = {"linear": "0", "batch_norm": "1"}
_SEMI_SUPERVISED = ("y_prior", "classifier", "u_encoder", "z_decoder")


def load_scvi_tools(cls: type[SCANVAE], state_dict: Mapping[str, Any], **kwargs: Any) -> SCANVAE:
    """A model with the weights of scvi-tools' SCANVAE; see :meth:`SCANVAE.from_scvi_tools`."""
    state = _tensors(state_dict)
    vae = cls(**scanvae_arguments(kwargs, state))
    vae.load_state_dict(_ours(vae, state, list(vae.state_dict())))
    return vae.eval()


def to_scvi_tools(vae: SCANVAE) -> dict[str, Tensor]:
    """Weights under the names of scvi-tools; see :meth:`SCANVAE.to_scvi_tools`."""
    if isinstance(getattr(vae, "dispersion", None), GeneLabelDispersion):
        raise InputError(
            "the dispersion belongs to a label; SCANVAE of scvi-tools cannot hold that"
        )
    if not len(vae.z_encoder.hidden.layers):
        raise InputError("n_layers=0: SCANVAE of scvi-tools has at least one hidden layer")
    owned = {k: v.detach().clone() for k, v in vae.state_dict().items()}
    state = _fillers(vae) | owned
    names = _scvi_names(state)
    state = {names[k]: _scvi_shape(names[k], v) for k, v in state.items()}
    if "groups_index" in state:
        groups = state.pop("groups_index")
        masks = torch.arange(int(groups.max()) + 1)[:, None] == groups.cpu()
        state |= {f"groups_index.{i}": mask.byte() for i, mask in enumerate(masks)}
    return state


def shared_state(vae: SCANVAE, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of our state dict that an unsupervised VAE of scvi-tools gives: a warm start.

    These are the encoders of z and l, the decoder of x, the dispersion, the embedding of the
    batches and the prior of the library. Load it with
    ``vae.load_state_dict(shared_state(vae, state_dict), strict=False)``.

    Parameters
    ----------
    vae
        The model to be started; its sizes must be those of the VAE.
    state_dict
        ``module.state_dict()`` of an SCVI model.

    Raises
    ------
    InputError
        If keys are missing, unexpected or of another shape.
    """
    keys = [k for k in vae.state_dict() if not k.startswith(_SEMI_SUPERVISED)]
    return _ours(vae, _tensors(state_dict), keys)


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a state dict, with one tensor for the members of all groups of labels."""
    # Saved models hold the (empty) parameter store of Pyro among the weights.
    state = {k: torch.as_tensor(v) for k, v in state_dict.items() if k != "pyro_param_store"}
    groups = [k for k in state if re.fullmatch(r"groups_index\.\d+", k)]
    if groups:
        masks = [state.pop(f"groups_index.{i}") for i in range(len(groups))]
        state["groups_index"] = torch.stack(masks).int().argmax(0)
    return state


def _ours(vae: SCANVAE, state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The entries `keys` of our state dict, out of a complete one of scvi-tools."""
    own = vae.state_dict()
    names = _scvi_names(list(keys))
    missing = [name for name in names.values() if name not in state]
    unused = _scvi_names(_fillers(vae)).values()
    unexpected = [name for name in state if name not in {*names.values(), *unused}]
    found = {k: _our_shape(name, state[name]) for k, name in names.items() if name in state}
    misshapen = [
        f"{names[k]} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in found.items()
        if v.shape != own[k].shape
    ]
    _check_fit(missing=missing, unexpected=unexpected, misshapen=misshapen)
    return found


def _check_fit(**problems: list[str]) -> None:
    found = {kind: names for kind, names in problems.items() if names}
    if found:
        counts = "; ".join(
            f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items()
        )
        raise InputError(
            f"the state dict does not fit the model ({counts}). Give the arguments that the model "
            "of scvi-tools was made with (numbers of genes, batches, labels and covariates, "
            "n_layers, n_hidden, dispersion, ...)"
        )


def _scvi_names(keys: Iterable[str]) -> dict[str, str]:
    """scvi-tools' name for each of our keys."""
    keys = list(keys)
    names = {key: _scvi_name(key) for key in keys}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise InputError(f"scvi-tools has no place for {', '.join(unknown)}")
    if not any(k.startswith("classifier.") and ".layers." in k for k in keys):
        # A linear classifier is the first and only module of its sequence.
        linear = ("classifier.classifier.1", "classifier.classifier.0")
        names = {key: name.replace(*linear) for key, name in names.items()}
    return names


def _scvi_name(key: str) -> str | None:
    for ours, theirs in _NAMES.items():
        if key == ours or key.startswith(ours + "."):
            path = (theirs + key.removeprefix(ours)).split(".")
            if "fc_layers" in path:
                number, part, weight = path[-3:]
                path[-3:] = [f"Layer {number}", _PARTS_OF_A_LAYER.get(part, part), weight]
            return ".".join(path)
    return None


def _scvi_shape(name: str, value: Tensor) -> Tensor:
    if name in ("y_prior", "library_log_means", "library_log_vars"):
        return value.unsqueeze(0)
    return value.T.contiguous() if name == "px_r" and value.ndim == 2 else value


def _our_shape(name: str, value: Tensor) -> Tensor:
    if name in ("y_prior", "library_log_means", "library_log_vars"):
        return value.reshape(-1)
    return value.T if name == "px_r" and value.ndim == 2 else value


def _fillers(vae: SCANVAE) -> dict[str, Tensor]:
    """Defaults, under our names, of the heads that scvi-tools owns and this model does not."""
    own = vae.state_dict()
    n_genes, n_hidden = own["x_decoder.expression.0.weight"].shape
    zeros = own["x_decoder.expression.0.weight"].new_zeros
    heads = {}
    for head in ("dispersion.head", "x_decoder.gate"):
        heads |= {f"{head}.weight": zeros(n_genes, n_hidden), f"{head}.bias": zeros(n_genes)}
    if not hasattr(vae, "dispersion"):
        heads["dispersion.log_theta"] = zeros(n_genes)
    for key, value in own.items():
        name = key.replace("z_encoder.", "l_encoder.")
        if key.startswith("z_encoder.hidden.layers.0."):
            ones = key.endswith(("batch_norm.weight", "running_var"))
            heads[name] = torch.full_like(value, int(ones))
        elif key.startswith(("z_encoder.mean.", "z_encoder.variance.")):
            heads[name] = torch.zeros_like(value[:1])
    return {key: value for key, value in heads.items() if key not in own}


# ---- arguments ------------------------------------------------------------------------------

_NOT_OF_THE_MODULE = (
    "adata",
    "datamodule",
    "extra_payload_autotune",
    "pretrained_model",
    "registry",
    "unlabeled_category",
    "use_cuda",
)


def scanvae_arguments(
    given: Mapping[str, Any], state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Arguments for our SCANVAE that make the model scvi-tools makes from `given`.

    Parameters
    ----------
    given
        Arguments of SCANVAE, SCANVI or SCVI of scvi-tools, or ``init_params_`` of a model.
    state_dict
        Where the prior of the library is taken from; scvi-tools computes it when a model is made.
    """
    given = {k: v for k, v in _flattened(given).items() if k not in _NOT_OF_THE_MODULE}
    result = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
    _convert_sizes(result)
    _convert_library(result)
    _convert_parts(result)
    for name in ("library_log_means", "library_log_vars"):
        if state_dict is not None and name in state_dict:
            result[name] = torch.as_tensor(state_dict[name]).reshape(-1)
    return result


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    if "non_kwargs" not in given:
        return dict(given)
    extra = given.get("kwargs", {}).values()
    return dict(given["non_kwargs"]) | {k: v for group in extra for k, v in group.items()}


def _convert_sizes(arguments: dict[str, Any]) -> None:
    if arguments.get("n_cats_per_cov") is not None:
        arguments["n_cats_per_cov"] = [int(n) for n in arguments["n_cats_per_cov"]]
    if arguments.get("n_layers") == 0:  # scvi-tools: one hidden layer, but none in the classifier
        arguments |= {"n_layers": 1, "linear_classifier": True}


def _convert_library(arguments: dict[str, Any]) -> None:
    """A size factor comes first; priors belong to a latent library only."""
    if "use_size_factor_key" in arguments:  # saved models have the name of the column
        arguments["use_size_factor_key"] = bool(arguments["use_size_factor_key"])
    if arguments.get("use_size_factor_key"):
        arguments["use_observed_lib_size"] = True
    if arguments.get("use_observed_lib_size", True):
        arguments.pop("library_log_means", None)
        arguments.pop("library_log_vars", None)


def _convert_parts(arguments: dict[str, Any]) -> None:
    classifier = dict(arguments.pop("classifier_parameters", None) or {})
    # Before 1.1 the classifier ended in a softmax, which has no weights: logits are the same.
    classifier.pop("logits", None)
    if classifier:
        arguments["classifier_parameters"] = classifier
    if not arguments.get("use_labels_groups"):
        arguments.pop("labels_groups", None)
    if arguments.get("batch_representation", "one-hot") == "one-hot":
        arguments.pop("batch_embedding_kwargs", None)
    for name in ("extra_encoder_kwargs", "extra_decoder_kwargs"):
        extra = dict(arguments.pop(name, None) or {})
        if "activation_fn" in extra:
            extra["activation"] = extra.pop("activation_fn")
        if extra:
            arguments[name] = extra


# ---- saved models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ScviSave:
    """What scvi-tools wrote to the disk when an SCVI or SCANVI was saved.

    Attributes
    ----------
    model_name
        "SCVI" or "SCANVI".
    version
        Of scvi-tools.
    state_dict
        Weights, by the names of scvi-tools.
    var_names
        Names of the genes, in the order of the weights.
    setup_args
        Arguments of ``setup_anndata``: keys of labels, batch, covariates, size factor, layer.
    init_params
        Arguments that the model was made with, beside those that the data give.
    labels
        Categories of the labels in the order of their codes; the unlabelled category is among
        them where it is known, as the last.
    unlabeled_category
        Its name; None for an SCVI.
    batches
        Categories of the batches in the order of their codes.
    covariate_categories
        Categories of each categorical covariate in the order of their codes, by its key.
    continuous_covariates
        Keys of the continuous covariates.
    registry
        All that scvi-tools noted about the data.
    """

    model_name: str
    version: str
    state_dict: dict[str, Tensor]
    var_names: np.ndarray
    setup_args: dict[str, Any]
    init_params: dict[str, Any]
    labels: list
    unlabeled_category: Any
    batches: list
    covariate_categories: dict[str, list]
    continuous_covariates: list[str]
    registry: dict[str, Any]

    @property
    def classes(self) -> list:
        """Labels that a cell can have, in the order of their codes: without the unlabelled."""
        return [label for label in self.labels if label != self.unlabeled_category]

    @property
    def ends_in_softmax(self) -> bool:
        """Whether scvi-tools' classifier gave probabilities, as before version 1.1."""
        parameters = self.init_params.get("classifier_parameters") or {}
        before = tuple(int(n) for n in re.findall(r"\d+", self.version)[:2]) < (1, 1)
        return before and not parameters.get("logits", False)

    def arguments(self) -> dict[str, Any]:
        """Arguments for our SCANVAE; the number of labels is that of `classes`."""
        sizes = {
            "n_input": len(self.var_names),
            "n_batch": len(self.batches),
            "n_labels": len(self.classes),
            "n_continuous_cov": len(self.continuous_covariates),
            "n_cats_per_cov": [len(c) for c in self.covariate_categories.values()],
            "use_size_factor_key": self.setup_args.get("size_factor_key"),
        }
        return scanvae_arguments(self.init_params | sizes, self.state_dict)

    def fields(self) -> dict[str, Any]:
        """Arguments of :class:`~pyro_scanvi.data.fields.Fields`: columns and categories."""
        keys = ("labels_key", "layer", "batch_key", "size_factor_key")
        return {
            **{key: self.setup_args.get(key) or "" for key in keys},
            "unlabeled_category": self.unlabeled_category,
            "categorical_covariate_keys": tuple(self.covariate_categories),
            "continuous_covariate_keys": tuple(self.continuous_covariates),
            "classes": np.array(self.classes),
            "batches": np.array(self.batches),
            "covariate_categories": tuple(map(np.array, self.covariate_categories.values())),
            "genes": self.var_names,
        }


def read_scvi_save(
    directory: str | Path, prefix: str = "", allow: Mapping[str, Any] | None = None
) -> ScviSave:
    """Read what ``SCVI.save`` or ``SCANVI.save`` of scvi-tools 1.x wrote; executes none of it.

    Parameters
    ----------
    directory, prefix
        As they were given to ``save``.
    allow
        Further names that the pickle may use; see :func:`pyro_scanvi.scvi_tools.pickles.read`.

    Raises
    ------
    InputError
        If there is no such file, it names functions other than those that make arrays, or it holds
        something else than such a model.
    """
    path = user_path(directory) / f"{prefix}model.pt"
    if not path.is_file():
        raise InputError(
            f"{path} is not there; expected the folder that save() of scvi-tools wrote. Versions "
            "before 0.15 wrote three files: convert them with its convert_legacy_save"
        )
    saved = pickles.read(path, allow)
    try:
        return _scvi_save(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no SCVI or SCANVI that scvi-tools 1.x saved: {error!r}"
        ) from error


def _scvi_save(saved: Mapping[str, Any]) -> ScviSave:
    attributes = saved["attr_dict"]
    registry = attributes["registry_"]
    state = {k: v["state_registry"] for k, v in registry["field_registries"].items()}
    categorical = state.get("extra_categorical_covs", {})
    mappings = categorical.get("mappings", {})
    return ScviSave(
        model_name=registry["model_name"],
        version=registry["scvi_version"],
        state_dict={k: v for k, v in saved["model_state_dict"].items() if isinstance(v, Tensor)},
        var_names=np.asarray(saved["var_names"], dtype=str),
        setup_args=dict(registry["setup_args"]),
        init_params=_flattened(attributes["init_params_"]),
        labels=list(state["labels"]["categorical_mapping"]),
        unlabeled_category=state["labels"].get("unlabeled_category"),
        batches=list(state["batch"]["categorical_mapping"]),
        covariate_categories={k: list(mappings[k]) for k in categorical.get("field_keys", [])},
        continuous_covariates=list(state.get("extra_continuous_covs", {}).get("columns", [])),
        registry=registry,
    )

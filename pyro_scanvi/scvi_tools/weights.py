"""Weights of SCANVAE under scvi-tools' names and in its shapes, and back: state dicts alone.

What differs: scvi-tools writes (1, L) for the prior of the labels and (1, S) for that of the
library, genes before batches in the dispersion, and it owns every head, used or not.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_scanvi.validation import InputError

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


def our_state(own: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict out of a complete one of scvi-tools' SCANVAE.

    Parameters
    ----------
    own
        The state dict of the model that is to take it up: its keys and shapes.
    state_dict
        ``module.state_dict()`` of a SCANVAE of scvi-tools.

    Raises
    ------
    InputError
        If keys are missing, unexpected or of another shape; it counts and lists them.
    """
    return _found(own, _tensors(state_dict), list(own))


def shared_state(own: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of our state dict that an unsupervised VAE of scvi-tools gives: a warm start.

    These are the encoders of z and l, the decoder of x, the dispersion, the embedding of the
    batches and the prior of the library. Load it with ``load_state_dict(..., strict=False)``.

    Parameters
    ----------
    own
        The state dict of the model that is to be started, of the sizes of the VAE.
    state_dict
        ``module.state_dict()`` of an SCVI model.

    Raises
    ------
    InputError
        If keys are missing, unexpected or of another shape.
    """
    keys = [k for k in own if not k.startswith(_SEMI_SUPERVISED)]
    return _found(own, _tensors(state_dict), keys)


def scvi_state(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours as scvi-tools' SCANVAE loads it; heads that we do not own are zeros.

    Raises
    ------
    InputError
        If scvi-tools has no place for an entry, or no hidden layer was meant.
    """
    if not any(key.startswith("z_encoder.hidden.layers.") for key in own):
        raise InputError("n_layers=0: SCANVAE of scvi-tools has at least one hidden layer")
    owned = {k: v.detach().clone() for k, v in own.items()}
    ours = _fillers(own) | owned
    names = _scvi_names(ours)
    state = {names[k]: _scvi_shape(names[k], v) for k, v in ours.items()}
    if "groups_index" in state:
        groups = state.pop("groups_index")
        masks = torch.arange(int(groups.max()) + 1)[:, None] == groups.cpu()
        state |= {f"groups_index.{i}": mask.byte() for i, mask in enumerate(masks)}
    return state


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a state dict, with one tensor for the members of all groups of labels."""
    # Saved models hold the (empty) parameter store of Pyro among the weights.
    state = {k: torch.as_tensor(v) for k, v in state_dict.items() if k != "pyro_param_store"}
    groups = [k for k in state if re.fullmatch(r"groups_index\.\d+", k)]
    if groups:
        masks = [state.pop(f"groups_index.{i}") for i in range(len(groups))]
        state["groups_index"] = torch.stack(masks).int().argmax(0)
    return state


def _found(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], keys: Iterable[str]
) -> dict[str, Tensor]:
    """The entries `keys` of our state dict, out of a complete one of scvi-tools."""
    names = _scvi_names(keys)
    missing = [name for name in names.values() if name not in state]
    unused = _scvi_names(_fillers(own)).values()
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
    found = {key: _scvi_name(key) for key in keys}
    names = {key: name for key, name in found.items() if name is not None}
    unknown = [key for key in found if key not in names]
    if unknown:
        raise InputError(f"scvi-tools has no place for {', '.join(unknown)}")
    if not any(k.startswith("classifier.") and ".layers." in k for k in names):
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


def _fillers(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Defaults, under our names, of the heads that scvi-tools owns and this model does not."""
    n_genes, n_hidden = own["x_decoder.expression.0.weight"].shape
    zeros = own["x_decoder.expression.0.weight"].new_zeros
    heads: dict[str, Tensor] = {}
    for head in ("dispersion.head", "x_decoder.gate"):
        heads |= {f"{head}.weight": zeros(n_genes, n_hidden), f"{head}.bias": zeros(n_genes)}
    if not any(key.startswith("dispersion.") for key in own):
        heads["dispersion.log_theta"] = zeros(n_genes)
    for key, value in own.items():
        name = key.replace("z_encoder.", "l_encoder.")
        if key.startswith("z_encoder.hidden.layers.0."):
            ones = key.endswith(("batch_norm.weight", "running_var"))
            heads[name] = torch.full_like(value, int(ones))
        elif key.startswith(("z_encoder.mean.", "z_encoder.variance.")):
            heads[name] = torch.zeros_like(value[:1])
    return {key: value for key, value in heads.items() if key not in own}

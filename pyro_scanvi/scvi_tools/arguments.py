"""Arguments of scvi-tools' models as arguments of our SCANVAE."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    given = {k: v for k, v in flattened(given).items() if k not in _NOT_OF_THE_MODULE}
    result = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
    _convert_sizes(result)
    _convert_library(result)
    _convert_parts(result)
    for name in ("library_log_means", "library_log_vars"):
        if state_dict is not None and name in state_dict:
            result[name] = torch.as_tensor(state_dict[name]).reshape(-1)
    return result


def flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments in one dict, where scvi-tools keeps them by kind (``init_params_``)."""
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

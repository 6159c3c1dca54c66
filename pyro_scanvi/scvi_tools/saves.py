"""What scvi-tools wrote when an SCVI or SCANVI was saved; nothing in it is executed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyro_scanvi.scvi_tools import pickles
from pyro_scanvi.scvi_tools.arguments import flattened, scanvae_arguments
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.validation import InputError


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
        """Arguments of :class:`~pyro_scanvi.data.fields.Fields`, in scvi-tools' order of codes."""
        keys = self.setup_args
        return {
            "labels_key": keys.get("labels_key") or "",
            "unlabeled_category": self.unlabeled_category,
            "layer": keys.get("layer") or "",
            "batch_key": keys.get("batch_key") or "",
            "size_factor_key": keys.get("size_factor_key") or "",
            "categorical_covariate_keys": tuple(self.covariate_categories),
            "continuous_covariate_keys": tuple(self.continuous_covariates),
            "classes": np.array(self.classes),
            "batches": np.array(self.batches),
            "covariate_categories": tuple(map(np.array, self.covariate_categories.values())),
            "genes": self.var_names,
        }


def read_save(
    directory: str | Path, prefix: str = "", allow: Mapping[str, Any] | None = None
) -> ScviSave:
    """Read what ``SCVI.save`` or ``SCANVI.save`` of scvi-tools wrote; executes none of it.

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
        return _save_of(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no SCVI or SCANVI that scvi-tools saved: {error!r}"
        ) from error


def _save_of(saved: Mapping[str, Any]) -> ScviSave:
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
        init_params=flattened(attributes["init_params_"]),
        labels=list(state["labels"]["categorical_mapping"]),
        unlabeled_category=state["labels"].get("unlabeled_category"),
        batches=list(state["batch"]["categorical_mapping"]),
        covariate_categories={k: list(mappings[k]) for k in categorical.get("field_keys", [])},
        continuous_covariates=list(state.get("extra_continuous_covs", {}).get("columns", [])),
        registry=registry,
    )

"""What users of scvi-tools type: each name that we do not have says what has its place here."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anndata as ad

from pyro_scanvi.validation import InputError, check_known

SPLIT = "train() splits the cells, and this model has not been trained here"
SETUP = "view_anndata_setup() returns the columns and categories as a table"
REGISTRY = f"model.fields holds the columns and categories that the model reads; {SETUP}"
MANAGER = "SCANVI.setup_anndata(adata, ...) notes all that there is in adata.uns['pyro_scanvi']"
NO_ID = "a model has no id; save(folder) names it, training_settings and seed say how it was made"
MINIFIED = (
    "counts are needed to ask; get_latent_representation(return_dist=True) gives mean and variance"
)
SHAP = "genes are not attributed to labels here; differential_expression(groupby=...) ranks them"
ATTRIBUTES = {  # of a SCANVI of scvi-tools 1.4.2, what to use here
    "adata_manager": REGISTRY,
    "convert_legacy_save": "SCANVI.load_scvi_tools(folder, adata) opens what versions from 0.15 on "
    "have saved; older saves have to be converted by scvi-tools",
    "data_registry": REGISTRY,
    "deregister_manager": MANAGER,
    "differential_abundance": "compare predict() between samples, as by pandas.crosstab, or "
    "neighbourhoods in get_latent_representation()",
    "get_aggregated_posterior": "get_latent_representation(return_dist=True) gives mean and "
    "variance of each cell, which it mixes",
    "get_anndata_manager": REGISTRY,
    "get_from_registry": REGISTRY,
    "get_importance_weights": "get_marginal_ll() weights by importance, over its own draws",
    "get_normalized_function_name": "it is get_normalized_expression()",
    "get_normalized_function_name_": "it is get_normalized_expression()",
    "get_ranked_features": SHAP,
    "get_setup_arg": REGISTRY,
    "get_state_registry": REGISTRY,
    "history_": "it is model.history",
    "id": NO_ID,
    "init_params_": "model.vae_arguments holds the arguments of the module, model.seed its seed",
    "is_trained_": "it is model.is_trained",
    "labels_": "adata.obs[model.fields.labels_key] holds the labels",
    "load_registry": "SCANVI.load(folder).fields holds the columns and categories",
    "minified_data_type": MINIFIED,
    "minify_adata": MINIFIED,
    "n_labels": "it is len(model.fields.classes), without the unlabelled category",
    "original_label_key": "it is model.fields.labels_key",
    "prepare_query_mudata": "there is no MuData here; SCANVI.prepare_query_anndata(adata, "
    "reference) takes its AnnData of RNA",
    "register_manager": MANAGER,
    "registry": REGISTRY,
    "registry_": REGISTRY,
    "run_id": NO_ID,
    "run_id_": NO_ID,
    "run_name": NO_ID,
    "run_name_": NO_ID,
    "semisupervised_history_": "it is model.history, where the split is 'train' or 'validation'",
    "shap_adata_predict": SHAP,
    "shap_predict": SHAP,
    "summary_stats": f"print(model) gives the numbers of cells, genes and labels; {SETUP}",
    "test_indices": SPLIT,
    "test_indices_": "it is model.test_indices",
    "train_indices": SPLIT,
    "train_indices_": "it is model.train_indices",
    "trainer": "Lightning's Trainer ends with train(); callbacks=, logger= and trainer_kwargs= "
    "reach it while it runs",
    "transfer_fields": MANAGER,
    "unlabeled_category_": "it is model.fields.unlabeled_category",
    "unsupervised_history_": "it is model.history, where the split is 'pretrain'",
    "update_setup_method_args": MANAGER,
    "validation_indices": SPLIT,
    "validation_indices_": "it is model.validation_indices",
    "view_registry": SETUP,
    "view_setup_args": f"open the folder with SCANVI.load(folder), and {SETUP}",
    "view_setup_method_args": SETUP,
    "was_pretrained": "model.history has a split 'pretrain' where there was a warm start",
}

WATCHING = (
    "early_stopping=True watches the ELBO of held-out cells; for another score give "
    "callbacks=[EarlyStopping(...)] of Lightning"
)
SPLITTING = (
    "train_size= and validation_size= split the cells, by the seed of the model "
    "(SCANVI(adata, seed=...)), always shuffled"
)
CHECKPOINTS = "checkpoint_dir= keeps the last epoch; callbacks=[ModelCheckpoint(...)] the best one"
DEVICES = "accelerator=, devices= and strategy= choose where training runs"
BAR = "progress_bar= shows one or none; callbacks=[TQDMProgressBar(...)] another one"
CLIP = "it is plan_kwargs={'gradient_clip_norm': ...}"
CELLS = "cells come from the AnnData that the model was made with, SCANVI(adata)"
TRAIN = {  # arguments of scvi-tools' train, now or once, and of Lightning's Trainer
    "adversarial_classifier": "it belongs to TOTALANVI; leave it out of train()",
    "checkpointing_monitor": CHECKPOINTS,
    "compile": "nothing is compiled; leave it out of train()",
    "datamodule": CELLS,
    "datasplitter_kwargs": SPLITTING,
    "early_stopping_min_delta": WATCHING,
    "early_stopping_mode": WATCHING,
    "early_stopping_monitor": WATCHING,
    "early_stopping_warmup_epochs": WATCHING,
    "enable_checkpointing": CHECKPOINTS,
    "enable_model_summary": "callbacks=[ModelSummary()] of Lightning prints one",
    "external_indexing": SPLITTING,
    "frequency": "it is check_val_every_n_epoch=",
    "gradient_clip_algorithm": CLIP,
    "gradient_clip_val": CLIP,
    "learning_rate_monitor": "callbacks=[LearningRateMonitor()] with a logger= logs it",
    "log_save_dir": "a logger= knows its folder, as CSVLogger(folder) does",
    "n_epochs": "it is max_epochs=",
    "n_epochs_semisupervised": "it is max_epochs=",
    "n_epochs_unsupervised": "it is pretrain_epochs=",
    "num_nodes": "strategy='ddp' takes as many machines as the launcher (docs/many_machines.md)",
    "num_sanity_val_steps": "held-out cells are scored after an epoch, every "
    "check_val_every_n_epoch=",
    "overfit_batches": "make a model of few cells instead, SCANVI(adata[:100].copy()); train() "
    "goes through all of them",
    "plan_config": "it is plan_kwargs=",
    "plugins": DEVICES,
    "progress_bar_refresh_rate": BAR,
    "semisupervised_trainer_kwargs": "it is trainer_kwargs=",
    "shuffle_set_split": SPLITTING,
    "simple_progress_bar": BAR,
    "sync_batchnorm": "with strategy='ddp' batch norms are those of all processes; leave it out",
    "trainer_config": "it is trainer_kwargs=",
    "unsupervised_trainer_kwargs": "pretrain_epochs= trains without labels first, by the same "
    "trainer_kwargs=",
    "use_distributed_sampler": "with strategy='ddp' ours deals the cells; leave it out of train()",
    "use_cuda": "accelerator='gpu' trains on a GPU, 'auto' where there is one",
    "use_gpu": "accelerator='gpu' trains on a GPU, 'auto' where there is one",
    "val_check_interval": "held-out cells are scored after an epoch, every "
    "check_val_every_n_epoch=",
}
PROTEIN = (
    "SCANVI.setup_anndata(..., extra={'protein': 'obsm/...'}) reads any matrix of "
    "obsm, for a model of your own that observes it (docs/extending.md)"
)
SETUP_ANNDATA = {
    "use_minified": "SCANVI.setup_anndata reads counts alone, and no AnnData is minified here; "
    "leave it out",
    "protein_expression_obsm_key": PROTEIN,
    "protein_names_uns_key": "names of proteins are the columns of a DataFrame in obsm: "
    "SCANVI.setup_anndata(..., extra={'protein': 'obsm/...'}) reads it",
    "modalities": "pyro_scanvi.data.mudata.as_anndata puts the proteins of a MuData into obsm of "
    "the AnnData of RNA; name them, SCANVI.setup_anndata(..., extra={'protein': 'obsm/...'})",
}
MODEL = {
    "datamodule": "SCANVI.setup_anndata(adata, ...) checks cells, then SCANVI(adata) reads them",
    "registry": "SCANVI.setup_anndata(adata, ...) notes the columns, then SCANVI(adata) reads them",
    "use_cuda": "model.to_device('cuda') moves it",
}


def missing(owner: str, name: str) -> AttributeError:
    """The error for an attribute that there is not; for one of scvi-tools it says what to use."""
    if name in ATTRIBUTES:
        return AttributeError(f"{owner} has no {name!r}: {ATTRIBUTES[name]}")
    return AttributeError(f"{owner!r} has no attribute {name!r}")


class Names(type):
    """The class of SCANVI: ``SCANVI.load_registry`` says what has its place, as instances do."""

    def __getattr__(cls, name: str) -> Any:
        raise missing(cls.__name__, name)


def refuse(given: Mapping[str, Any], table: Mapping[str, str], call: str) -> None:
    """TypeError for the first argument that the table knows."""
    for name in given:
        if name in table:
            raise TypeError(f"{call} has no argument {name!r}: {table[name]}")


def check_model_arguments(adata: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse scvi-tools' arguments of its SCANVI, and a model instead of an AnnData."""
    refuse(arguments, MODEL, "SCANVI()")
    if isinstance(adata, ad.AnnData):
        return
    hint = (
        "; SCANVI.from_scvi_model(folder, adata, labels_key, unlabeled_category) starts from what "
        "an SCVI of scvi-tools has saved, SCANVI.load_query_data(adata, model) from a SCANVI"
    )
    is_model = hasattr(adata, "module")
    raise InputError(f"got a {type(adata).__name__}, expected an AnnData{hint if is_model else ''}")


def check_saved(folder: Any) -> None:
    """Refuse a model of scvi-tools where the folder of a saved one is meant."""
    if hasattr(folder, "module"):
        raise InputError(
            f"got a {type(folder).__name__} itself, expected its folder: "
            "scvi_model.save(folder), and give the folder"
        )


def check_setup_arguments(setup: Callable, unknown: Mapping[str, Any]) -> None:
    """Refuse what `setup` does not spell out: TypeError that names ours, or the nearest."""
    refuse(unknown, SETUP_ANNDATA, "setup_anndata()")
    check_known(unknown, _spelled(setup), "an argument of setup_anndata()")


def trainer_arguments(
    train: Callable,
    of_plan: Iterable[str],
    of_trainer: Iterable[str],
    keywords: Mapping[str, Any],
    trainer_kwargs: Mapping[str, Any] | None,
    progress_bar: bool,
) -> tuple[dict[str, Any], bool]:
    """Arguments of Lightning's Trainer, given as keywords or in `trainer_kwargs`; and the bar.

    Parameters
    ----------
    train
        The method that was called.
    of_plan
        Names that belong into its `plan_kwargs`.
    of_trainer
        Arguments of Lightning's Trainer that it passes on.
    keywords
        What it got and does not spell out.
    trainer_kwargs, progress_bar
        As it got them; ``enable_progress_bar`` among the others is the latter.

    Raises
    ------
    TypeError
        For an argument that is given twice, of scvi-tools or of the plan, which names ours, or of
        nobody, which names the nearest.
    """
    in_dict = trainer_kwargs or {}
    if not isinstance(in_dict, Mapping):
        raise InputError(f"trainer_kwargs={trainer_kwargs!r}, expected a dict")
    own, given = _spelled(train), {**in_dict, **keywords}
    for name in in_dict:
        if name in {*own, *keywords}:
            raise TypeError(f"{name!r} is an argument of train(); leave it out of trainer_kwargs")
    in_plan = {field: f"it is plan_kwargs={{{field!r}: ...}}" for field in of_plan}
    refuse(given, in_plan | TRAIN, "train()")
    known = [*own, *of_trainer, "enable_progress_bar"]
    check_known(keywords, known, "an argument of train() or of Lightning's Trainer")
    if "enable_progress_bar" in given and not progress_bar:
        raise TypeError("enable_progress_bar and progress_bar=False are one thing; give one")
    progress_bar = given.pop("enable_progress_bar", progress_bar)
    return given, progress_bar


def _spelled(function: Callable) -> list[str]:
    """The arguments that a function names."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]

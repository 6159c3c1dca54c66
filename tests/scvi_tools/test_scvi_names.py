"""What users of scvi-tools type works, or the error names what has its place here."""

import copy
import inspect
import pickle
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.scvi_tools.names import ATTRIBUTES, MODEL, SETUP_ANNDATA, TRAIN, trainer_arguments
from pyro_scanvi.training.settings import Plan
from pyro_scanvi.training.trainer import OURS, free_arguments
from tests.examples import SMALL, simulated, small_model

QUIET = {"batch_size": 32, "progress_bar": False}
FOLDER = Path(__file__).parent.parent / "reference"

# Public names of a trained SCANVI of scvi-tools 1.4.2, as dir() gives them.
NAMES = """
adata adata_manager convert_legacy_save data_registry deregister_manager device
differential_abundance differential_expression from_scvi_model get_aggregated_posterior
get_anndata_manager get_elbo get_feature_correlation_matrix get_from_registry
get_importance_weights get_latent_library_size get_latent_representation get_likelihood_parameters
get_marginal_ll get_normalized_expression get_normalized_function_name
get_normalized_function_name_ get_ranked_features get_reconstruction_error get_setup_arg
get_state_registry get_var_names history history_ id init_params_ is_trained is_trained_ labels_
load load_query_data load_registry minified_data_type minify_adata module n_labels
original_label_key posterior_predictive_sample predict prepare_query_anndata prepare_query_mudata
register_manager registry registry_ run_id run_id_ run_name run_name_ save semisupervised_history_
setup_anndata shap_adata_predict shap_predict summary_stats summary_string test_indices
test_indices_ to_device train train_indices train_indices_ trainer transfer_fields
unlabeled_category_ unsupervised_history_ update_setup_method_args validation_indices
validation_indices_ view_anndata_setup view_registry view_setup_args view_setup_method_args
was_pretrained
"""
ON_THE_CLASS = """
convert_legacy_save from_scvi_model load load_query_data load_registry prepare_query_anndata
prepare_query_mudata register_manager setup_anndata view_setup_args
"""
# Arguments of its train(), and of the Trainer that it passes the others to.
TRAIN_ARGUMENTS = """
accelerator adversarial_classifier batch_size benchmark check_val_every_n_epoch
checkpointing_monitor datamodule datasplitter_kwargs default_root_dir devices early_stopping
early_stopping_min_delta early_stopping_mode early_stopping_monitor early_stopping_patience
early_stopping_warmup_epochs enable_checkpointing enable_model_summary enable_progress_bar
learning_rate_monitor log_every_n_steps log_save_dir logger max_epochs n_samples_per_label
num_sanity_val_steps plan_config plan_kwargs progress_bar_refresh_rate shuffle_set_split
simple_progress_bar train_size trainer_config validation_size
"""
OLDER = """
use_gpu frequency n_epochs n_epochs_unsupervised unsupervised_trainer_kwargs
"""
SETUP_ARGUMENTS = """
adata batch_key categorical_covariate_keys continuous_covariate_keys labels_key layer
size_factor_key unlabeled_category use_minified
"""
MODEL_ARGUMENTS = """
adata registry n_hidden n_latent n_layers dropout_rate dispersion gene_likelihood
use_observed_lib_size linear_classifier datamodule
"""

SPELLED = list(inspect.signature(SCANVI.train).parameters)
OUR_WORDS = {  # any of these in a message is a name that can be typed here
    *(name for name in dir(small_model(simulated())) if not name.startswith("_")),
    *(f"{name}=" for name in SPELLED),
    "predict()",
    "train()",
}


def names_ours(message: str) -> bool:
    """Whether what a message says after naming what was asked for has a name of ours."""
    words = set(re.findall(r"\w+=|\w+", message.partition(": ")[2]))
    return bool(words & OUR_WORDS)


@pytest.fixture(scope="module")
def model():
    """Trained on 80 % of the cells, scored on 10 %."""
    model = small_model(simulated())
    return model.train(2, train_size=0.8, validation_size=0.1, **QUIET)


# ---- attributes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES.split())
def test_every_attribute_is_there_or_names_ours(model, name):
    if hasattr(model, name):
        return
    with pytest.raises(AttributeError) as caught:
        getattr(model, name)
    assert names_ours(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", ON_THE_CLASS.split())
def test_every_name_of_the_class_is_there_or_names_ours(name):
    if hasattr(SCANVI, name):
        return
    with pytest.raises(AttributeError) as caught:
        getattr(SCANVI, name)
    assert names_ours(str(caught.value)), str(caught.value)


def test_what_is_there(model):
    """The list, so that no name is lost unseen."""
    assert {name for name in NAMES.split() if not hasattr(model, name)} == set(ATTRIBUTES) - {
        *("train_indices", "validation_indices", "test_indices")
    }


def test_no_other_names_are_in_the_table():
    assert set(ATTRIBUTES) <= set(NAMES.split())


@pytest.mark.parametrize("name", ["nothing", "__nothing__", "_data_", "predictt"])
def test_other_names_are_missing_as_in_any_class(model, name):
    for owner in (model, SCANVI):
        with pytest.raises(AttributeError, match=f"'SCANVI' has no attribute '{name}'"):
            getattr(owner, name)


def test_subclasses_have_the_names_too():
    class Mine(SCANVI):
        pass

    with pytest.raises(AttributeError, match=r"Mine has no 'load_registry'"):
        _ = Mine.load_registry


def test_copies_and_pickles(model):
    for twin in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == repr(model)
        assert (twin.train_indices == model.train_indices).all()


def test_indices(model):
    """Each cell is in one of three; so many of each as was asked for; those of the seed."""
    parts = model.train_indices, model.validation_indices, model.test_indices
    assert sorted(np.concatenate(parts)) == list(range(120))
    assert [len(part) for part in parts] == pytest.approx([96, 12, 12], abs=4)
    twin = small_model(simulated(), seed=1).train(1, train_size=0.8, validation_size=0.1, **QUIET)
    assert not np.array_equal(twin.train_indices, parts[0])


def test_held_out_cells_are_those_of_training(monkeypatch):
    """Their own counts reach the scoring of an epoch, in order."""
    seen = []

    class Watched(SCANVAE):
        def guide(self, cells):
            if not self.training:
                seen.append(cells.x.clone())
            return super().guide(cells)

    model = small_model(simulated(), module_class=Watched)
    model.train(1, train_size=0.8, **QUIET)
    expected = model.adata.X[model.validation_indices]
    np.testing.assert_array_equal(torch.cat(seen).numpy(), expected)


@pytest.mark.parametrize("name", ["train_indices", "validation_indices", "test_indices"])
def test_no_indices_before_training(name):
    untrained = small_model(simulated())
    assert not hasattr(untrained, name)
    with pytest.raises(AttributeError, match=f"SCANVI has no '{name}': .*not been trained here"):
        getattr(untrained, name)


def test_indices_survive_a_save(model, tmp_path):
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", simulated())
    np.testing.assert_array_equal(again.validation_indices, model.validation_indices)


def test_genes(model):
    names = model.get_var_names()
    assert list(names) == list(model.adata.var_names)
    names[0] = "changed"
    assert model.fields.genes[0] == "gene0"


# ---- device -------------------------------------------------------------------------------------


def test_the_device(model):
    assert model.device == torch.device("cpu")
    assert model.to_device("cpu") is None and len(model.predict()) == 120
    moved = copy.deepcopy(model)
    moved.to_device("meta")  # there is one on every machine
    assert moved.device == torch.device("meta")
    assert {p.device.type for p in moved.module.parameters()} == {"meta"}


@pytest.mark.parametrize("device", ["gpu", "no device", None, 1.5, 999])
def test_no_such_device(model, device):
    with pytest.raises(InputError, match="device=.* cannot be used"):
        model.to_device(device)
    assert model.device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_on_a_gpu(model):
    expected = model.predict(soft=True)
    for device in ("cuda", 0):
        moved = copy.deepcopy(model)
        moved.to_device(device)
        assert moved.device == torch.device("cuda", 0)
        pd.testing.assert_frame_equal(moved.predict(soft=True), expected, atol=1e-4)


# ---- what it says of itself ---------------------------------------------------------------------


def columned() -> SCANVI:
    """A model that reads a column of each kind."""
    adata = simulated()
    adata.obs["batch"] = np.array(["b1", "b2"])[np.arange(120) % 2]
    adata.obs["donor"] = np.array(["d1", "d2", "d3", "d4"])[np.arange(120) % 4]
    adata.obs["age"] = np.arange(120.0)
    adata.obs["size"] = adata.X.sum(1)
    adata.layers["counts"] = adata.X
    SCANVI.setup_anndata(
        adata,
        "cell_type",
        "Unknown",
        layer="counts",
        batch_key="batch",
        size_factor_key="size",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    return SCANVI(adata, **(SMALL | {"y_prior": [0.25, 0.25, 0.5]}))


def test_repr():
    model = columned()
    n_labelled = (model.adata.obs["cell_type"] != "Unknown").sum()
    assert (
        repr(model)
        == model.summary_string
        == (
            "SCANVI of 120 cells and 20 genes, counts in layer 'counts'\n"
            f"labels: obs['cell_type'] (3 categories), known of {n_labelled} cells; the others are "
            "'Unknown'\n"
            "batch: obs['batch'] (2 categories)\n"
            "covariates: obs['size'], obs['donor'] (4 categories), obs['age']\n"
            "module: SCANVAE(n_latent=4, dropout_rate=0.1, linear_classifier=False, n_hidden=16, "
            "y_prior=[0.25, 0.25, 0.5])\n"
            "trained: no, 0 epochs here"
        )
    )


def test_repr_of_other_models(model):
    """Without columns; trained; of a query, whose trainable weights are those with a gradient."""
    lines = repr(model).splitlines()
    assert lines[2:4] == ["batch: none", "covariates: none"]
    assert lines[-1] == "trained: yes, 2 epochs here"
    query = SCANVI.load_query_data(simulated(30), model)
    total = sum(p.numel() for p in query.module.parameters())
    free = sum(p.numel() for p in query.module.parameters() if p.requires_grad)
    last = f"query: {free} of {total} weights can be trained, the others are frozen"
    assert repr(query).splitlines()[-2:] == ["trained: yes, 0 epochs here", last]
    assert "module: Mine(" in repr(
        small_model(simulated(), module_class=type("Mine", (SCANVAE,), {}))
    )


def test_repr_stays_short():
    """Whatever the arguments hold, it is a few lines."""
    adata = simulated()
    prior = torch.full((3,), 1 / 3)
    model = small_model(
        adata, y_prior=prior, gene_likelihood=lambda p: torch.distributions.Poisson(p.mu)
    )
    assert len(repr(model).splitlines()) == 6 and len(repr(model)) < 700


def test_the_setup_as_a_table(capsys):
    """Returned, not printed; of the model, or of an AnnData that was set up."""
    model = columned()
    table = model.view_anndata_setup()
    expected = {
        "counts": ("layer 'counts'", 20, "gene0, gene1, gene2, gene3, gene4, ..."),
        "labels": ("obs['cell_type']", 3, "B, NK, T"),
        "batch": ("obs['batch']", 2, "b1, b2"),
        "size factor": ("obs['size']", pd.NA, ""),
        "categorical covariate": ("obs['donor']", 4, "d1, d2, d3, d4"),
        "continuous covariate": ("obs['age']", pd.NA, ""),
    }
    assert list(table.index) == list(expected)
    assert list(table.columns) == ["place", "n_categories", "categories"]
    for row, values in expected.items():
        assert tuple(map(str, table.loc[row])) == tuple(map(str, values))
    other = small_model(simulated())
    pd.testing.assert_frame_equal(other.view_anndata_setup(model.adata), table)
    assert list(other.view_anndata_setup().index) == ["counts", "labels"]
    with pytest.raises(InputError, match="not been set up"):
        model.view_anndata_setup(simulated())
    assert capsys.readouterr().out == ""


# ---- train --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*TRAIN_ARGUMENTS.split(), *OLDER.split(), *TRAIN}))
def test_every_argument_of_train_is_there_or_names_ours(name):
    if name in SPELLED or name in ("benchmark", "default_root_dir", "log_every_n_steps"):
        return
    if name == "enable_progress_bar":
        return
    with pytest.raises(TypeError, match=rf"train\(\) has no argument '{name}': ") as caught:
        small_model(simulated()).train(1, **{name: 1})
    assert names_ours(str(caught.value)), str(caught.value)


LIGHTNINGS = [n for n in inspect.signature(lightning.Trainer.__init__).parameters if n != "self"]


@pytest.mark.parametrize("name", LIGHTNINGS)
@pytest.mark.parametrize("as_keyword", [True, False])
def test_every_argument_of_lightnings_trainer(name, as_keyword):
    """Goes to it, is the progress bar, or names ours; as a keyword and in the dict."""
    known = SCANVI.train, [f.name for f in fields(Plan) if f.name != "objective"], free_arguments()
    given = (*known, {name: 1}, {}) if as_keyword else (*known, {}, {name: 1})
    if name == "enable_progress_bar":
        assert trainer_arguments(*given, True) == ({}, 1)
    elif name in OURS:
        if as_keyword and name in SPELLED:
            return
        message = "is an argument of train" if name in SPELLED else f"no argument '{name}': "
        with pytest.raises(TypeError, match=message) as caught:
            trainer_arguments(*given, True)
        assert name in SPELLED or names_ours(str(caught.value))
    else:
        assert trainer_arguments(*given, True) == ({name: 1}, True)


@pytest.mark.parametrize("name", [f.name for f in fields(Plan) if f.name != "objective"])
def test_fields_of_the_plan_name_their_place(name):
    with pytest.raises(TypeError, match=rf"'{name}': it is plan_kwargs=\{{'{name}': \.\.\.\}}"):
        small_model(simulated()).train(1, **{name: 1})


def test_keywords_reach_the_trainer():
    limits = {"max_steps": 7, "limit_val_batches": 0}
    models = [
        small_model(simulated()).train(9, batch_size=32, **given)
        for given in (
            {"progress_bar": False, "trainer_kwargs": limits},
            {"enable_progress_bar": False, **limits},
            {
                "trainer_kwargs": {"enable_progress_bar": False, "max_steps": 7},
                "limit_val_batches": 0,
            },
        )
    ]
    assert models[0].n_epochs_trained == 2 and set(models[0].history["split"]) == {"train"}
    assert models[0].history.equals(models[1].history)
    assert models[0].history.equals(models[2].history)


@pytest.mark.parametrize("shown", [True, False])
def test_enable_progress_bar_is_the_progress_bar(capsys, shown):
    small_model(simulated()).train(1, batch_size=32, enable_progress_bar=shown)
    assert ("ELBO" in capsys.readouterr().out) == shown


REFUSED = {
    "twice": ({"max_steps": 1, "trainer_kwargs": {"max_steps": 1}}, "'max_steps' is an argument"),
    "two bars": ({"enable_progress_bar": True, "progress_bar": False}, "are one thing; give one"),
    "in the dict": ({"trainer_kwargs": {"max_epochs": 1}}, "'max_epochs'.*leave it out"),
    "theirs in the dict": ({"trainer_kwargs": {"use_gpu": True}}, "'use_gpu': accelerator='gpu'"),
    "a typing error": ({"max_epoch": 1}, "did you mean 'max_epochs'"),
    "another": ({"baerbones": True}, "did you mean 'barebones'"),
    "the plan": ({"lr": 1e-3}, "plan_kwargs"),
    "clipping": ({"gradient_clip_val": 1.0}, "gradient_clip_norm"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_arguments_of_train(arguments, message):
    """At the door: nothing is trained."""
    model = small_model(simulated())
    with pytest.raises(TypeError, match=message):
        model.train(**arguments)
    assert not len(model.history) and not model.training_settings


def test_trainer_kwargs_is_a_dict():
    with pytest.raises(InputError, match=r"trainer_kwargs=\['max_steps'\], expected a dict"):
        small_model(simulated()).train(1, trainer_kwargs=["max_steps"])


def test_the_table_does_not_hide_what_train_takes():
    assert not set(TRAIN) & set(SPELLED)
    assert set(OURS) <= {*SPELLED, *TRAIN, "enable_progress_bar"}


# ---- setting up, making and opening -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*SETUP_ARGUMENTS.split(), *SETUP_ANNDATA}))
def test_every_argument_of_setup_is_there_or_names_ours(name):
    if name in inspect.signature(SCANVI.setup_anndata).parameters:
        return
    with pytest.raises(TypeError, match=f"no argument '{name}'") as caught:
        SCANVI.setup_anndata(simulated(), "cell_type", "Unknown", **{name: True})
    assert names_ours(str(caught.value))


def test_unknown_arguments_of_setup_name_the_nearest():
    adata = simulated()
    with pytest.raises(TypeError, match="'batch'.*did you mean 'batch_key'"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch="b")
    assert "pyro_scanvi" not in adata.uns


@pytest.mark.parametrize("name", sorted({*MODEL_ARGUMENTS.split(), *MODEL}))
def test_every_argument_of_the_model_is_there_or_names_ours(name):
    if name == "adata" or name in inspect.signature(SCANVAE).parameters:
        return
    with pytest.raises(TypeError, match=f"no argument '{name}'") as caught:
        small_model(simulated(), **{name: True})
    assert names_ours(str(caught.value))


def test_a_model_is_no_anndata(model):
    """scvi-tools makes a model of a model in some ways; here each has a name."""
    theirs = SimpleNamespace(module=torch.nn.Identity())
    for given in (model, theirs):
        with pytest.raises(InputError, match="expected an AnnData; SCANVI.from_scvi_model"):
            SCANVI(given)
        for make in (SCANVI.load_scvi_tools, SCANVI.from_scvi_model):
            arguments = {} if make == SCANVI.load_scvi_tools else {"labels_key": "cell_type"}
            arguments |= {"unlabeled_category": "Unknown"} if arguments else {}
            with pytest.raises(InputError, match=r"expected its folder: scvi_model.save\(folder\)"):
                make(given, simulated(), **arguments)
    with pytest.raises(InputError, match="got a str, expected an AnnData$"):
        SCANVI("cells.h5ad")


def test_a_folder_of_scvi_tools_is_told_apart():
    with pytest.raises(InputError, match="no saved model.*SCANVI.load_scvi_tools"):
        SCANVI.load(FOLDER / "saved_scanvi", simulated())

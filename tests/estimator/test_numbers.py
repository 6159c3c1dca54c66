"""Numbers of numpy, pandas and torch: what is trained, saved and recorded is as of Python's own."""

import inspect
import json
import typing
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from pyro_scanvi import SCANVAE, SCANVI
from pyro_scanvi.data.minibatches import CellData, library_prior
from pyro_scanvi.estimator.scanvi import FROM_DATA
from pyro_scanvi.posterior.fold_changes import Settings
from pyro_scanvi.surgery.freezing import Freeze
from pyro_scanvi.training.checkpoints import digest
from pyro_scanvi.training.settings import DataSettings, Plan, TrainerSettings
from pyro_scanvi.validation import plain, plain_number
from tests.examples import QUESTIONS, random_cells, simulated, small_vae

NUMBERS = {int, float, bool}
KINDS = {  # how an integer, a float and a truth value are made
    "64 bits": (np.int64, np.float64, np.bool_),
    "32 bits": (np.int32, np.float32, np.bool_),
    "small": (np.uint8, np.float16, np.bool_),
    "arrays": (np.array, np.array, np.array),
    "tensors": (torch.tensor, torch.tensor, torch.tensor),
    "pandas": (
        lambda n: pd.array([n], dtype="Int64").sum(),
        lambda x: pd.Series([x], dtype="float32").iloc[0],
        lambda b: pd.array([b], dtype="boolean")[0],
    ),
}

# Where the default is no number, or not one for a small example.
VALUES = {
    "n_top_genes": 15,
    "n_hidden": 16,
    "n_latent": 4,
    "use_labels_groups": True,
    "use_observed_lib_size": False,
    "max_epochs": 2,
    "pretrain_epochs": 1,
    "n_samples_per_label": 9,
    "validation_size": 0.2,
    "train_size": 0.8,
    "batch_size": 32,
    "class_balanced": True,
    "early_stopping": True,
    "devices": 1,
    "progress_bar": False,
    "seed": 3,
    "n_epochs_kl_warmup": 3,
    "gradient_clip_norm": 5.0,
    "reduce_lr_on_plateau": True,
    "mc_samples": 7,
    "n_mc_samples": 7,
    "n_samples_overall": 40,
    "rna_size_factor": 100.0,
    "return_numpy": True,
    "pseudocounts": 0.01,
    "silent": True,
    "confidence": 0.4,
    "reject": 0.2,
}
NESTED = {
    "y_prior": [0.25, 0.25, 0.5],
    "labels_groups": [0, 1, 1],
    "classifier_parameters": {"n_hidden": 8, "n_layers": 1, "dropout_rate": 0.1},
    "batch_representation": "embedding",
    "batch_embedding_kwargs": {"embedding_dim": 2},
    "extra_encoder_kwargs": {"bias": True},
}
TRAINER = {"min_epochs": 1, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}


def kinds_of(parameter):
    annotation = parameter.annotation
    return NUMBERS & set(typing.get_args(annotation) or [annotation])


def numbers_of(function, without=()):
    """Every numeric argument of a function, with a value of Python's own."""
    parameters = inspect.signature(function).parameters
    names = [n for n, p in parameters.items() if n not in without and kinds_of(p)]
    values = {name: VALUES.get(name, parameters[name].default) for name in names}
    unknown = [name for name, value in values.items() if type(value) not in NUMBERS]
    assert not unknown, f"give a value of {unknown} in VALUES"
    return values


def written(value, kind):
    """The same, with the numbers in it of another kind."""
    if isinstance(value, dict):
        return {name: written(entry, kind) for name, entry in value.items()}
    if isinstance(value, list):
        return [written(entry, kind) for entry in value]
    if kind is None or type(value) not in NUMBERS:
        return value
    return KINDS[kind][[int, float, bool].index(type(value))](value)


def cells(seed=0):
    adata = simulated(seed=seed)
    adata.obs["batch"] = np.repeat(["one", "two"], 60)
    return adata


def new_model(kind=None):
    adata = cells()
    columns = ("cell_type", "Unknown", None, "batch")
    SCANVI.setup_anndata(adata, *columns, **written(numbers_of(SCANVI.setup_anndata), kind))
    arguments = numbers_of(SCANVI) | numbers_of(SCANVAE, without=FROM_DATA) | NESTED
    return SCANVI(adata, **written(arguments, kind))


def trained(model, kind=None, **more):
    """Everything that is a number, in train, in its plan and for the Trainer."""
    arguments = numbers_of(SCANVI.train) | {"plan_kwargs": numbers_of(Plan)}
    arguments |= {"trainer_kwargs": TRAINER}
    return model.train(**(written(arguments, kind) | more))


def of_a_run(folder, kind=None):
    """Records and weights of a model that is trained, checkpointed, saved, loaded and resumed."""
    model = trained(new_model(kind), kind, checkpoint_dir=folder)
    model.save(folder / "model")
    more = {"ckpt_path": folder / "last.ckpt", "max_epochs": written(3, kind)}
    resumed = trained(new_model(kind), kind, **more)
    loaded = SCANVI.load(folder / "model", model.adata)
    query = SCANVI.load_query_data(
        cells(1), folder / "model", **written(numbers_of(SCANVI.load_query_data), kind)
    )
    query.save(folder / "query")
    states = [m.module.state_dict() for m in (model, resumed, loaded, query)]
    files = [folder / name / "model.json" for name in ("model", "query")]
    records = [json.loads(file.read_text()) for file in files]
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)["pyro_scanvi"]
    records += [checkpoint["identity"], loaded.annotate().uns["pyro_scanvi"]["settings"]]
    return json.dumps([*records, resumed.training_settings]), states


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return of_a_run(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_plain_numbers(plain_run, tmp_path, kind):
    records, states = of_a_run(tmp_path, kind)
    assert records == plain_run[0]
    for state, expected in zip(states, plain_run[1], strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_the_numbers_of_a_run_are_those_given(plain_run):
    """What was said is what the record holds; not only is one kind as wrong as another."""
    record = json.loads(plain_run[0])[0]
    assert record["arguments"].items() >= NESTED.items()
    assert record["arguments"]["n_hidden"] == 16 and record["seed"] == 3
    settings = record["training_settings"]
    expected = numbers_of(Plan) | {"max_epochs": 2, "train_size": 0.8, "batch_size": 32}
    assert settings.items() >= expected.items()


@pytest.fixture(scope="module")
def model():
    return trained(new_model())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered_as_of_plain_numbers(model, name, kind):
    arguments = numbers_of(getattr(SCANVI, name))
    more = {"groupby": "truth"} if name == "differential_expression" else {}
    expected, found = (getattr(model, name)(**written(arguments, k), **more) for k in (None, kind))
    assert type(found) is type(expected)
    for one, other in zip(listed(found), listed(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def listed(answer):
    """Arrays of an answer, names of columns among them."""
    if isinstance(answer, dict):
        return [np.array(list(answer)), *answer.values()]
    if isinstance(answer, pd.DataFrame):
        return [answer.index, answer.columns, *(answer[name] for name in answer)]
    return list(answer) if isinstance(answer, tuple) else [answer]


def test_every_question_is_asked():
    """So that a test of none of them does not pass."""
    assert set(QUESTIONS) == {
        "differential_expression",
        "get_elbo",
        "get_feature_correlation_matrix",
        "get_latent_library_size",
        "get_latent_representation",
        "get_likelihood_parameters",
        "get_marginal_ll",
        "get_novelty",
        "get_normalized_expression",
        "get_reconstruction_error",
        "posterior_predictive_sample",
        "predict",
        "predict_sets",
    }
    assert "seed" in numbers_of(SCANVI.predict) and "fdr_target" in numbers_of(
        SCANVI.differential_expression
    )


def test_columns_have_the_name_of_the_decimal(model):
    asked = {"groupby": "truth", "silent": True, "n_samples_overall": 40}
    table = model.differential_expression(**asked, fdr_target=np.float32(0.05))
    assert "is_de_fdr_0.05" in table


# ---- what is no such number ---------------------------------------------------------------------

DOORS = {
    "setup_anndata": lambda model, **one: SCANVI.setup_anndata(
        cells(), "cell_type", "Unknown", **one
    ),
    "SCANVI": lambda model, **one: SCANVI(model.adata, **one),
    "train": lambda model, **one: model.train(**({"max_epochs": 1, "progress_bar": False} | one)),
    "plan": lambda model, **one: model.train(1, plan_kwargs=one),
    "load_query_data": lambda model, **one: SCANVI.load_query_data(cells(1), model, **one),
}
CONSTRUCTORS = {
    "setup_anndata": [SCANVI.setup_anndata],
    "SCANVI": [SCANVI, SCANVAE],
    "train": [SCANVI.train],
    "plan": [Plan],
    "load_query_data": [SCANVI.load_query_data],
}
ARGUMENTS = [
    (door, name, kinds_of(inspect.signature(function).parameters[name]))
    for door, functions in CONSTRUCTORS.items()
    for function in functions
    for name in numbers_of(function, without=(*FROM_DATA, "devices", "logger"))
    # Flags of networks are read as truth values, whatever they are.
    if function is not SCANVAE or kinds_of(inspect.signature(function).parameters[name]) != {bool}
]
ASKED = [
    (name, argument)
    for name in QUESTIONS
    for argument in numbers_of(getattr(SCANVI, name))
    if int in kinds_of(inspect.signature(getattr(SCANVI, name)).parameters[argument])
]
NEEDED = {"early_stopping_patience": {"early_stopping": True}}


@pytest.mark.parametrize("door, name, kinds", ARGUMENTS)
def test_other_things_are_refused_before_anything_is_made(model, door, name, kinds):
    """True is no number, 2.0 no integer (150.0 epochs neither), a word no truth value."""
    wrong = {int: (True, 2.0, np.True_, np.float64(2), "2"), float: (True, "2"), bool: ("no",)}
    before = [tensor.clone() for tensor in model.module.state_dict().values()]
    for value in wrong[next(iter(kinds))]:
        with pytest.raises(ValueError, match=f"{name}='?(True|2|no).*expected"):
            DOORS[door](model, **({name: value} | NEEDED.get(name, {})))
    assert all(map(torch.equal, before, model.module.state_dict().values()))


@pytest.mark.parametrize("name, argument", ASKED)
def test_no_integers_for_questions(model, name, argument):
    more = {"groupby": "truth"} if name == "differential_expression" else {}
    for value in (True, 2.0, "2"):
        with pytest.raises(ValueError, match=f"{argument}="):
            getattr(model, name)(**{argument: value}, **more)


# ---- the door itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        (np.int64(3), 3),
        (np.uint8(200), 200),
        (np.float16(1e-3), 1e-3),
        (np.float32(0.05), 0.05),
        (np.float32(1e30), 1e30),
        (np.float64(1) / 3, 1 / 3),
        (np.longdouble(0.5), 0.5),
        (np.bool_(False), False),
        (np.str_("Adam"), "Adam"),
        (np.array(7), 7),
        (np.array(0.1, np.float32), 0.1),
        (torch.tensor(0.1), 0.1),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(True), True),
        (torch.nn.Parameter(torch.tensor(0.3)), 0.3),
        (np.float32("inf"), float("inf")),
        (150.0, 150.0),
        ("1", "1"),
        (None, None),
        ({"a": (np.int8(1), [np.float32(0.1)])}, {"a": (1, [0.1])}),
    ],
)
def test_plain(given, expected):
    found = plain(given)
    assert found == expected and type(found) is type(expected)
    assert json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize("value", [np.ones(1), torch.ones(2), object(), [].append])
def test_what_is_no_number_stays_the_same_object(value):
    assert plain_number(value) is value and plain([value])[0] is value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [DataSettings, Plan, TrainerSettings, Settings, Freeze])
def test_settings_of_their_own(settings, kind):
    """Where they are made without an estimator."""
    numbers = numbers_of(settings, without=["early_stopping"])
    more = {"new": {}} if settings is Freeze else {}
    given = asdict(settings(**written(numbers, kind), **more))
    assert {name: given[name] for name in numbers} == numbers
    assert all(type(given[name]) is type(value) for name, value in numbers.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scanvae_of_such_sizes(kind):
    """The network on its own, outside of the estimator."""
    sizes = {"n_input": 20, "n_labels": 3, "n_hidden": 8, "n_latent": 4, "n_layers": 2}
    sizes |= {"n_batch": 2, "dropout_rate": 0.25, "n_continuous_cov": 1}
    expected, vae = (small_vae(**written(sizes, k)) for k in (None, kind))
    cells = random_cells(expected)
    for module in (expected, vae):
        torch.manual_seed(0)
        module.drawn = module.q_z(cells).mean
    assert torch.equal(vae.drawn, expected.drawn)
    assert vae.n_latent == 4 and all(
        torch.equal(t, expected.state_dict()[n]) for n, t in vae.state_dict().items()
    )


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, matrix",
    [(np.float16, np.asarray)]  # scipy has no sparse float16
    + [(t, m) for t in (np.uint8, np.int16, np.float32) for m in (np.asarray, csr_matrix)],
)
def test_totals_are_taken_in_64_bits(dtype, matrix):
    """Of 1,000 genes with 100 counts each; float16 ends at 65,504, float32 loses single counts."""
    counts = np.full((6, 1000), 100)
    codes = np.zeros(6, dtype=int)
    if dtype == np.float32:
        counts[:, 0] = 2**25
        counts[:, 1] = 1
    data, exact = (CellData(matrix(counts.astype(d)), codes, codes) for d in (dtype, np.float64))
    assert digest(data) == digest(exact)
    np.testing.assert_array_equal(library_prior(data, 1)[0], [np.log(counts[0].sum())])

"""Random configurations on odd data: trained for a few steps without NaN, or refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from pyro_scanvi import ELBO, IWAE, SCANVI, InputError
from pyro_scanvi.training.nonfinite import NonFiniteError

NORMS = st.sampled_from(["both", "encoder", "decoder", "none"])
TRAINED, STOPPED, REFUSED = "trained", "stopped", "refused"
UNANSWERED = "trained, and cells named that it has no finite answer for"


@dataclass(frozen=True)
class Data:
    """Cells to make.

    Attributes
    ----------
    n_cells, n_genes, n_types, n_batches
        Numbers; cells of the last types and batches may be missing.
    mean, spread
        Of the log of the genes' means.
    one_gene
        Whether one gene has nearly all counts.
    share_labelled
        Of the cells.
    covariate
        Factor of a continuous covariate.
    sparse, empty_cell
        Whether counts are CSR; whether a cell has none.
    setup
        Which of the columns are named.
    """

    n_cells: int
    n_genes: int
    n_types: int
    n_batches: int
    mean: float
    spread: float
    one_gene: bool
    share_labelled: float
    covariate: float
    sparse: bool
    empty_cell: bool
    setup: Mapping[str, Any]

    def cells(self) -> ad.AnnData:
        """The same for the same attributes."""
        rng, n = np.random.default_rng(0), self.n_cells
        means = np.exp(self.mean + self.spread * rng.normal(size=self.n_genes))
        counts = rng.poisson(np.minimum(means, 1e7), size=(n, self.n_genes)).astype(np.float32)
        counts[:, 0] += 1 + 1e6 * self.one_gene
        counts[0] *= not self.empty_cell
        label = rng.integers(self.n_types, size=n).astype(str)
        obs = {
            "label": np.where(rng.random(n) < self.share_labelled, label, "Unknown"),
            "batch": rng.integers(self.n_batches, size=n).astype(str),
            "donor": rng.integers(3, size=n).astype(str),
            "age": self.covariate * rng.normal(size=n),
            "size": np.exp(rng.normal(size=n)),
        }
        frame = pd.DataFrame(obs, index=[f"cell{i}" for i in range(n)])
        genes = pd.DataFrame(index=[f"gene{i}" for i in range(self.n_genes)])
        return ad.AnnData(csr_matrix(counts) if self.sparse else counts, frame, genes)


def some_of(choices: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these arguments, each left out as often as not."""
    return st.fixed_dictionaries({}, optional=choices)


SETUPS = some_of(
    {
        "batch_key": st.just("batch"),
        "categorical_covariate_keys": st.just(["donor"]),
        "continuous_covariate_keys": st.just(["age"]),
        "size_factor_key": st.just("size"),
    }
)
DATA = st.builds(
    Data,
    n_cells=st.integers(0, 59).map(lambda n: 60 - n),  # the first of each are the likeliest
    n_genes=st.integers(1, 40),
    n_types=st.integers(0, 28).map(lambda n: 2 + n if n < 28 else 1),
    n_batches=st.integers(1, 20),
    mean=st.floats(-6, 12),
    spread=st.floats(0, 3),
    one_gene=st.booleans(),
    share_labelled=st.sampled_from([0.5, 0.05, 1.0, 0.2, 0.8, 0.0]),
    covariate=st.sampled_from([0.0, 1.0, 1e4]),
    sparse=st.booleans(),
    empty_cell=st.integers(0, 19).map(lambda i: i == 0),
    setup=SETUPS,
)
MODELS = some_of(
    {
        "n_hidden": st.sampled_from([1, 2, 16, 64]),
        "n_latent": st.integers(1, 8),
        "n_layers": st.integers(0, 3),
        "dropout_rate": st.floats(0, 0.9),
        "dispersion": st.sampled_from(["gene", "gene-batch", "gene-label", "gene-cell"]),
        "gene_likelihood": st.sampled_from(["zinb", "nb", "poisson"]),
        "log_variational": st.booleans(),
        "use_batch_norm": NORMS,
        "use_layer_norm": NORMS,
        "latent_distribution": st.sampled_from(["normal", "ln"]),
        "encode_covariates": st.booleans(),
        "deeply_inject_covariates": st.booleans(),
        "use_observed_lib_size": st.booleans(),
        "linear_classifier": st.booleans(),
        "batch_representation": st.sampled_from(["one-hot", "embedding"]),
    }
)
PLANS = some_of(
    {
        "lr": st.sampled_from([1e-4, 1e-3, 1e-2]),
        "classification_ratio": st.sampled_from([0, 1, 50, 1000]),
        "feed_labels": st.booleans(),
        "n_epochs_kl_warmup": st.integers(0, 5),
        "gradient_clip_norm": st.floats(0.01, 100),
        "weight_decay": st.sampled_from([0.0, 1e-6, 0.1]),
    }
)
TRAININGS = some_of(
    {
        "pretrain_epochs": st.integers(0, 1),
        "train_size": st.sampled_from([0.5, 0.9, 1.0]),
        "batch_size": st.integers(1, 64),
        "class_balanced": st.booleans(),
        "n_samples_per_label": st.integers(1, 5),
        "objective": st.sampled_from([ELBO(), IWAE(3)]),
        "plan_kwargs": PLANS,
    }
)


def outcome(data: Data, arguments: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Trained, or why not; AssertionError where a number that is kept or told is none."""
    adata = data.cells()
    try:
        SCANVI.setup_anndata(adata, "label", "Unknown", **data.setup)
        model = SCANVI(adata, **{"n_hidden": 16, "n_latent": 4} | arguments)
        try:
            model.train(2, progress_bar=False, **training)
        except NonFiniteError as error:
            check_weights(model)
            assert error.fault.cells.size and "smaller lr" in str(error)
            return STOPPED
    except InputError as error:
        return f"{REFUSED}: {error}"
    check_weights(model)
    try:
        check_answers(model)
    except InputError as error:
        assert "no finite answer" in str(error)
        return UNANSWERED
    return TRAINED


def check_weights(model: SCANVI) -> None:
    """All are finite."""
    for name, value in model.module.state_dict().items():
        assert value.isfinite().all(), name


def check_answers(model: SCANVI) -> None:
    """Losses, labels and latent space."""
    assert np.isfinite(model.history[["elbo", "reconstruction"]]).all(axis=None)
    soft = model.predict(soft=True).to_numpy()
    assert np.isfinite(soft).all()
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-4)
    assert np.isfinite(model.get_latent_representation()).all()


def each(n: int, see: Callable[[str], None]) -> Callable[[], None]:
    """A test of so many configurations, the same ones each time; each outcome is shown to `see`."""

    @seed(0)
    @settings(max_examples=n, database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(DATA, MODELS, TRAININGS)
    def test(data: Data, arguments: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        see(outcome(data, arguments, training))

    return test

"""Settings trained over several seeds on the same cells and hidden labels, and their scores."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pyro_scanvi.datasets import hide_labels
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.experiments.intervals import against, check_seeds, summary, tidy
from pyro_scanvi.experiments.plotting import of_metric, points
from pyro_scanvi.experiments.running import apart, clock, tracked
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.model.objectives import ELBO
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.validation import InputError, check_at_least, check_flags, check_known, is_number

GIVEN = "pyro_scanvi_given"  # the column of labels, of which most are hidden
HIDDEN = "Unknown"
NOT_YET = {"max_epochs": 0, "pretrain_epochs": 0}
OF_FILES = ("checkpoint_dir", "ckpt_path")


def as_it_is(adata: ad.AnnData, seed: int) -> Mapping[str, Any]:
    """Nothing more is told of the cells."""
    return {}


@dataclass(frozen=True)
class Settings:
    """One row of a comparison.

    Attributes
    ----------
    model
        Arguments of :class:`~pyro_scanvi.SCANVI`, such as ``{"dropout_rate": 0.1}``, and
        ``module_class``.
    train
        Arguments of :meth:`~pyro_scanvi.SCANVI.train`; ``plan_kwargs`` and ``trainer_kwargs`` are
        merged with the common ones, key by key.
    prepare
        What is told of the cells: called with the copy of the cells to train on, labels hidden in
        ``obs[GIVEN]``, and the seed; may add to the copy, and returns further arguments of
        ``SCANVI.setup_anndata``. It is not merged.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[ad.AnnData, int], Mapping[str, Any]] = as_it_is

    def over(self, common: "Settings") -> "Settings":
        """These settings, and what they leave open as in the common ones."""
        model, train = _merged(common.model, self.model), _merged(common.train, self.train)
        return Settings(model, train, self.prepare)


DEFAULT = Settings()


@dataclass(frozen=True)
class Trial:
    """The cells of a seed: those to train on, labels hidden, and those that nobody trains on."""

    seed: int
    training: ad.AnnData
    held_out: ad.AnnData
    truth: str
    n_mc_samples: int

    def model(self, settings: Settings) -> SCANVI:
        """An untrained one; the same weights for each seed where sizes are the same."""
        return SCANVI(self.training, seed=self.seed, **settings.model)

    def train(self, model: SCANVI, settings: Settings) -> SCANVI:
        """By the paper's ELBO on all cells, unless the settings say otherwise, without a bar."""
        arguments = {"train_size": 1.0, "progress_bar": False, "objective": ELBO()}
        arguments |= settings.train
        return model.train(**arguments)

    def scores(self, model: SCANVI) -> Iterator[tuple[str, float]]:
        """Of the hidden labels of cells trained on, and of the likelihood of held-out cells."""
        hidden = self.training.obs[GIVEN].to_numpy() == HIDDEN
        truth = self.training.obs[self.truth].astype(str).to_numpy()[hidden]
        soft = model.predict(soft=True, method="classifier").to_numpy()[hidden]
        code = pd.Index([str(name) for name in model.fields.classes]).get_indexer(truth)
        yield from label_scores(code, soft).items()
        yield "elbo", model.get_elbo(self.held_out, seed=self.seed)
        yield (
            "marginal_ll",
            model.get_marginal_ll(
                self.held_out, n_mc_samples=self.n_mc_samples, seed=self.seed, batch_size=64
            ),
        )


Score = Callable[[Trial, SCANVI], Iterable[tuple[str, float]]]


def compare(
    settings: Mapping[str, Settings],
    adata: ad.AnnData,
    seeds: Sequence[int] = range(5),
    *,
    truth: str = "cell_type",
    n_per_label: int = 10,
    held_out: float = 0.2,
    common: Settings = DEFAULT,
    setup: Mapping[str, Any] | None = None,
    n_mc_samples: int = 50,
    score: Score = Trial.scores,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Train each setting with each seed, and score it.

    A seed chooses the held-out cells, the labels that are shown, the first weights and the draws;
    all settings of a seed share them, so that :func:`~.intervals.against` compares them in pairs.
    The AnnData stays as it is.

    Parameters
    ----------
    settings
        By name, such as :data:`~.tables.OPTIMISERS`, with rows of one's own.
    adata
        Raw counts in X, or where `setup` says.
    seeds
        At least one; five give an interval.
    truth
        Column of obs with the labels.
    n_per_label
        How many of each are shown; at most half of a type.
    held_out
        Share of the cells that nobody trains on.
    common
        What all settings share and do not say themselves, such as the number of epochs.
    setup
        Further arguments of ``SCANVI.setup_anndata``, such as ``{"batch_key": "batch"}``.
    n_mc_samples
        Draws of the marginal likelihood.
    score
        From a trial and its trained model to names and values of metrics.
    progress_bar
        Show one.

    Returns
    -------
    DataFrame
        ``seed``, ``setting``, ``metric``, ``value``. "accuracy", "macro_f1" and
        "calibration_error" of the hidden labels of cells trained on; "elbo" and "marginal_ll" of
        held-out cells, labels unknown, in nats per cell; "seconds" of training. NaN where a loss or
        gradient was not finite, which :func:`~.intervals.against` refuses to pair.

    Raises
    ------
    InputError, TypeError
        For what cannot be trained: each setting is tried without an epoch before any is trained.

    Warns
    -----
    UserWarning
        Where a loss or gradient was not finite; the other runs go on.
    """
    rows: list[dict] = []
    check_at_least(1, n_per_label=n_per_label, n_mc_samples=n_mc_samples)
    check_flags(progress_bar=progress_bar)
    seeds = check_seeds(seeds)
    _check_data(adata, truth, held_out)
    merged = {name: s.over(common) for name, s in _checked(settings).items()}
    make = _Trials(adata, truth, n_per_label, held_out, dict(setup or {}), n_mc_samples)
    _try(merged, make, seeds[0])
    runs = [(seed, name) for seed in seeds for name in merged]
    for seed, name in tracked(runs, len(runs), "training", progress_bar):
        with apart(seed):
            for metric, value in _measured(make(seed, merged[name]), name, merged[name], score):
                rows.append({"seed": seed, "setting": name, "metric": metric, "value": value})
    return _completed(tidy(rows), runs)


def plot_comparison(frame: pd.DataFrame, metric: str = "accuracy", ax: Axes | None = None) -> Axes:
    """One metric of each setting: mean over seeds and its t interval."""
    axis = points(summary(of_metric(frame, metric)), ax=ax)
    axis.set(xlabel=metric)
    return axis


def plot_differences(
    frame: pd.DataFrame, baseline: str, metric: str = "accuracy", ax: Axes | None = None
) -> Axes:
    """The same as differences from a baseline, in pairs of a seed."""
    axis = points(against(of_metric(frame, metric), baseline), value="difference", ax=ax)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(xlabel=f"{metric}, difference from {baseline}")
    return axis


@dataclass(frozen=True)
class _Trials:
    """From a seed to its trial."""

    adata: ad.AnnData
    truth: str
    n_per_label: int
    held_out: float
    setup: Mapping[str, Any]
    n_mc_samples: int

    def __call__(self, seed: int, settings: Settings) -> Trial:
        n_cells = self.adata.n_obs
        order = np.random.default_rng(seed).permutation(n_cells)
        n_held = max(1, round(self.held_out * n_cells))
        held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
        training, out = self.adata[kept].copy(), self.adata[held].copy()
        training.obs[GIVEN] = hide_labels(
            training.obs[self.truth], self.n_per_label, seed, hidden=HIDDEN
        )
        out.obs[GIVEN] = HIDDEN
        told = {**self.setup, **settings.prepare(training, seed)}
        SCANVI.setup_anndata(training, GIVEN, HIDDEN, **told)
        return Trial(seed, training, out, self.truth, self.n_mc_samples)


def _completed(frame: pd.DataFrame, runs: Sequence[tuple[int, str]]) -> pd.DataFrame:
    """A row for each metric of each run; what was not measured is NaN."""
    names = ["seed", "setting", "metric"]
    every = [(*run, metric) for run in runs for metric in frame["metric"].unique()]
    index = pd.MultiIndex.from_tuples(every, names=names)
    return frame.set_index(names).reindex(index).reset_index()


def _measured(
    trial: Trial, name: str, settings: Settings, score: Score
) -> Iterator[tuple[str, float]]:
    model = trial.model(settings)
    now = clock(model.module.y_prior.device)
    try:
        trial.train(model, settings)
    except NonFiniteError as error:
        message = f"seed {trial.seed} of {name!r} was not trained to its end: {error}"
        warnings.warn(message, stacklevel=3)
        yield "seconds", np.nan  # what else is missing, _completed adds
        return
    seconds = now()
    yield from score(trial, model)
    yield "seconds", seconds


def _try(settings: Mapping[str, Settings], make: "_Trials", seed: int) -> None:
    """Make each model, and train it for no epoch; an error says which setting it is of."""
    for name, one in settings.items():
        try:
            with apart(0):
                trial = make(seed, one)
                trial.train(trial.model(one), Settings(one.model, {**one.train, **NOT_YET}))
        except (TypeError, ValueError) as error:
            error.add_note(f"setting {name!r}; nothing was trained yet")
            raise


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Own entries over common ones; where both are dicts, theirs too."""
    both = dict(common) | dict(own)
    for name in set(common).intersection(own):
        if isinstance(common[name], Mapping) and isinstance(own[name], Mapping):
            both[name] = _merged(common[name], own[name])
    return both


def _checked(settings: Mapping[str, Settings]) -> Mapping[str, Settings]:
    if not settings or not all(hasattr(s, "over") for s in settings.values()):
        raise InputError(
            f"settings={settings!r}, expected Settings by name, such as "
            '{"slow": Settings(train={"plan_kwargs": {"lr": 1e-4}})}'
        )
    for name, one in settings.items():
        for file in set(OF_FILES).intersection(one.train):
            raise InputError(f"setting {name!r}: runs would share {file}; leave it out")
    return settings


def _check_data(adata: ad.AnnData, truth: str, held_out: float) -> None:
    check_known([truth], adata.obs.columns, "a column of obs", InputError)
    missing = int(adata.obs[truth].isna().sum())
    if missing:
        raise InputError(f"obs[{truth!r}] lacks {missing} labels; leave those cells out")
    if not (is_number(held_out) and 0 < held_out < 1):
        raise InputError(f"held_out={held_out!r}, expected a share between 0 and 1")

"""What a report tells, part by part: sentences, tables, pictures, and how to read them."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pyro_scanvi import pl
from pyro_scanvi.app import plotting
from pyro_scanvi.app.scoring import Judged
from pyro_scanvi.app.seen import BY_RULES, COVERAGE, REJECT, Seen, leak_sentence
from pyro_scanvi.validation import InputError

LONGEST_NAME = 40  # letters, in a picture
MOST_DRAWN = 50_000  # cells
FARTHEST = 10  # cells that are named
N_MARKERS, N_DRAWS = 5, 1000
SEEN_IN = 0.1  # share of the cells of a type that a marker is found in
PACKAGES = ("pyro-scanvi", "torch", "pyro-ppl", "lightning", "anndata", "scanpy", "numpy", "scipy")


@dataclass(frozen=True)
class Table:
    """Rows of names and numbers; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, title: str, frame: pd.DataFrame) -> "Table":
        """Of a frame, whose index is the first column; what is missing is empty."""
        rows = frame.reset_index().astype(object)
        rows = rows.where(rows.notna(), "")
        return cls(title, [str(name) for name in rows.columns], rows.to_numpy().tolist())


@dataclass(frozen=True)
class Picture:
    """An image: its text for who does not see it, and its source, a data URI."""

    alt: str
    source: str


@dataclass(frozen=True)
class Part:
    """A part of a report; what cannot be told is a sentence."""

    title: str
    reading: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def what_was_given(seen: Seen) -> Part:
    """Cells, genes, columns and labels."""
    fields, given = seen.model.fields, pd.Series(seen.given, name="label")
    n_known = int(seen.labelled.sum())
    counts = given[seen.labelled].value_counts().sort_index().rename("cells").to_frame()
    setup = seen.model.view_anndata_setup().rename(columns={"n_categories": "number"})
    return Part(
        "What was given",
        "Check here first: are these the cells, the counts, the labels and the batches that you "
        "meant? A label of few cells is learned from those few alone.",
        [
            f"{len(seen.data)} cells and {len(fields.genes)} genes; {n_known} cells have a label, "
            f"{len(seen.data) - n_known} are {fields.unlabeled_category!r}.",
            *seen.notes,
        ],
        [Table.of("What the model reads", setup), Table.of("Labelled cells", counts)],
    )


def maps(seen: Seen) -> Part:
    """UMAP of the latent space by label, answer, confidence, novelty and batch."""
    n_cells, unlabeled = len(seen.data), seen.model.fields.unlabeled_category
    drawn = np.random.default_rng(seen.model.seed).permutation(n_cells)[:MOST_DRAWN]
    points = plotting.umap_of(seen.latent[drawn], seen.model.seed)
    short = short_names({unlabeled, *seen.given, *seen.predicted})
    of = f"UMAP of {len(drawn)} cells, coloured by"

    def by_name(what: str, names: np.ndarray, colours: dict[str, str]) -> Picture:
        draw = titled(what, partial(pl.map_of_names, points, names[drawn], colours=colours))
        return Picture(f"{of} {what}: {', '.join(np.unique(names))}", plotting.as_uri(draw))

    def by_number(what: str, values: np.ndarray) -> Picture:
        draw = titled(what, partial(pl.map_of_shares, points, values[drawn]))
        return Picture(f"{of} {what}, mean {values.mean():.2f}", plotting.as_uri(draw))

    given, predicted = (np.array([short[n] for n in a]) for a in (seen.given, seen.predicted))
    labels = pl.palette(sorted({*given, *predicted}), short[unlabeled])
    pictures = [
        by_name("given label", given, labels),
        by_name("predicted label", predicted, labels),
        by_number("confidence", seen.confidence),
    ]
    if seen.unfamiliar is not None:
        pictures.append(by_number("novelty", seen.unfamiliar.novelty))
    if seen.batch is not None:
        batch = _shortened(seen.batch)
        pictures.append(by_name("batch", batch, pl.palette(sorted(set(batch)))))
    sentences = (
        [] if len(drawn) == n_cells else [f"{len(drawn)} cells, drawn at random, are shown."]
    )
    if seen.batch is None:
        sentences.append("There is one batch, so that no picture shows batches.")
    return Part(
        "Maps",
        "Each point is a cell, and near points have similar latent states. UMAP keeps neighbours, "
        "not distances or sizes. Cells of one type should lie together whatever their batch; a "
        "batch that lies apart in every type was not corrected for, or has other cells. Low "
        "confidence belongs between types. High novelty in a group of its own may be a type that "
        "no label names.",
        sentences,
        pictures=pictures,
    )


def titled(title: str, draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """The same picture with a title."""

    def with_title(ax: Axes) -> Axes:
        axis = draw(ax=ax)
        axis.set_title(title)
        return axis

    return with_title


def leak(seen: Seen) -> Part:
    """Do labelled cells lie on islands?"""
    found = seen.leak()
    sentence = leak_sentence(found)
    return Part(
        "Leak of labels",
        "It asks whether labelled cells of a type have labelled cells for neighbours more often "
        "than others of that type do. Far above .5 the label itself shapes the latent space, and "
        "distances to labelled cells mean little; few cells of a type make its number noisy. "
        "Types of unlabelled cells are those that were predicted.",
        [f"{sentence[0].upper()}{sentence[1:]}."]
        if sentence
        else ["No label has two labelled cells and an unlabelled one, so that it cannot be told."],
        [Table.of("Leak by type", found.rename_axis("type").to_frame())] if len(found) else [],
        [_leak_picture(found)] if len(found) else [],
    )


def _leak_picture(found: pd.Series) -> Picture:
    alt = f"Leak by type: between {found.min():.2f} and {found.max():.2f}"
    drawn = found.rename(short_names(set(found.index)))
    return Picture(alt, plotting.as_uri(partial(pl.leak, drawn), 5, 1 + 0.3 * len(drawn)))


def held_out_labels(seen: Seen) -> Part:
    """Confusion and reliability of labels that were held out."""
    title = "Held-out labels"
    reading = (
        "A row is a label, a column what its cells are taken for: off the diagonal are mistakes. "
        "In the diagram of reliability, points on the dashed line are as often right as they say, "
        "points below it too sure; bars are 95 % intervals, wide where a bin has few cells. All of "
        "it holds for cells like these, and not for other batches, or types that have no label."
    )
    judged = seen.held_out
    if judged is None:
        return Part(title, reading, [f"It cannot be told: there are no {seen.of}."])
    scores, bins = judged.scores(), judged.reliability().set_index("confidence")
    sentences = [
        f"On {scores['cells']} {seen.of}: accuracy {scores['accuracy']:.3f}, macro-F1 "
        f"{scores['macro_f1']:.3f}, expected calibration error {scores['calibration_error']:.3f}.",
        "Strength and temperature of the rules were chosen on the same cells, which flatters them "
        "a little. Of a query they are the reference's cells, unless it has rules of its own."
        if seen.of == BY_RULES
        else "They are found by the seed of the model; of a model that was opened from a folder "
        "they are those only if it was opened with the cells that it was trained on.",
    ]
    return Part(
        title,
        reading,
        sentences,
        [
            Table.of("Scores by type", judged.by_type()),
            Table.of("Reliability", bins),
        ],
        [_confusion_picture(judged), _reliability_picture(judged)],
    )


def _confusion_picture(judged: Judged) -> Picture:
    confusion = judged.confusion()
    right = int(np.trace(confusion.to_numpy()))
    mistakes = confusion.where(~np.eye(len(confusion), dtype=bool), 0).stack()
    worst = ", ".join(
        f"{n} of {label} for {answer}" for (label, answer), n in mistakes.nlargest(3).items() if n
    )
    side = 3 + 0.3 * len(confusion)
    names = _shortened(np.array(judged.names, dtype=object))
    draw = partial(pl.confusion, names[judged.label], names[judged.answer])
    return Picture(
        f"Confusion matrix: {right} of {len(judged.label)} cells are right; most often "
        f"taken wrongly: {worst or 'none'}",
        plotting.as_uri(draw, side + 1, side),
    )


def _reliability_picture(judged: Judged) -> Picture:
    error = judged.scores()["calibration_error"]
    draw = partial(pl.reliability, judged.answer == judged.label, judged.soft.max(1))
    return Picture(
        f"Share of right answers by confidence; expected calibration error {error:.3f}",
        plotting.as_uri(draw, 5),
    )


def cells_by_type(seen: Seen) -> Part:
    """Number of cells of each type, and in each batch."""
    cells = pd.DataFrame({"predicted": seen.predicted, "confidence": seen.confidence})
    cells["labelled"] = seen.labelled
    by_type = cells.groupby("predicted")
    table = pd.DataFrame(
        {
            "cells": by_type.size(),
            "labelled": by_type["labelled"].sum(),
            "mean confidence": by_type["confidence"].mean(),
        }
    )
    tables = [Table.of("Cells by predicted type", table.rename_axis("type"))]
    pictures = [_confidence_picture(seen)]
    sentences = []
    if seen.batch is None:
        sentences.append("There is one batch, so that there is no table by batch.")
    else:
        by_batch = pd.crosstab(pd.Series(seen.predicted, name="type"), seen.batch)
        tables.append(Table.of("Cells by predicted type and batch", by_batch))
        pictures.append(_composition_picture(seen.predicted, seen.batch))
    missing = [name for name in seen.soft.columns if name not in table.index]
    if missing:
        sentences.append(f"No cell is predicted to be {', '.join(missing)}.")
    return Part(
        "Cells by type and batch",
        "Predicted numbers are of the most probable label of each cell. A type of low mean "
        "confidence is mixed up with others; one that occurs in a single batch may be real, or "
        "that batch's own shift.",
        sentences,
        tables,
        pictures,
    )


def _confidence_picture(seen: Seen) -> Picture:
    types = np.unique(seen.predicted)
    draw = partial(pl.confidence, _shortened(seen.predicted), seen.confidence)
    alt = (
        f"Confidence by predicted type; the median of all cells is {np.median(seen.confidence):.2f}"
    )
    return Picture(alt, plotting.as_uri(draw, 6, 1 + 0.3 * len(types)))


def _composition_picture(types: np.ndarray, batch: np.ndarray) -> Picture:
    n_types, n_batches = len(np.unique(types)), len(np.unique(batch))
    draw = partial(pl.composition, _shortened(types), _shortened(batch))
    alt = f"Shares of {n_types} predicted types in the cells of each of {n_batches} batches"
    return Picture(alt, plotting.as_uri(draw, 6, 1 + 0.3 * n_batches))


def cells_to_look_at(seen: Seen) -> Part:
    """Cells that are like no labelled ones, and those of which several labels are possible."""
    reading = (
        f"A cell is rejected, predict(reject={REJECT}), if it lies farther from the labelled cells "
        f"of each type than {1 - REJECT:.0%} of labelled cells do from their own; of cells of "
        f"known types about {REJECT:.0%} are lost so, and many more in a type speak for one that "
        f"has no label. Sets of labels, predict_sets(coverage={COVERAGE}), hold the true one for "
        f"about {COVERAGE:.0%} of cells like the labelled ones."
    )
    if seen.unfamiliar is None:
        lacking = "It cannot be told: the model has no label rules, which this is measured by."
        return Part("Cells to look at", reading, [lacking])
    found = seen.unfamiliar
    cells = pd.DataFrame(
        {
            "predicted": seen.predicted,
            "confidence": seen.confidence,
            "novelty": found.novelty,
            "rejected": found.rejected,
        },
        index=pd.Index(seen.model.adata.obs_names.astype(str), name="cell"),
    )
    by_type = cells.groupby("predicted")["rejected"].agg(["size", "sum", "mean"])
    by_type.columns = ["cells", "rejected", "share"]
    sizes = pd.Series(found.set_size, name="labels in the set").value_counts().sort_index()
    farthest = cells.nlargest(FARTHEST, "novelty").drop(columns="rejected")
    return Part(
        "Cells to look at",
        reading,
        [f"{found.rejected.sum()} of {len(cells)} cells are rejected."],
        [
            Table.of("Rejected cells by predicted type", by_type.rename_axis("type")),
            Table.of("Sets of labels", sizes.rename("cells").to_frame()),
            Table.of("The farthest cells", farthest),
        ],
    )


def losses(seen: Seen) -> Part:
    """Curves of training."""
    history, pictures = seen.model.history, []
    for column, title in pl.TITLES.items():
        if column in history.columns and history[column].notna().any():
            last = history.groupby("split")[column].last().dropna()
            alt = ", ".join(f"{split} ends at {value:.4g}" for split, value in last.items())
            draw = partial(pl.history, history, column)
            pictures.append(Picture(f"{title}, by epoch: {alt}", plotting.as_uri(draw, 5, 3.5)))
    return Part(
        "Training",
        "Curves that still rise (ELBO, accuracy) or fall (cross-entropy) at the end ask for more "
        "epochs; held-out curves that turn while those of training go on ask for fewer, or for "
        "early stopping. Labels may come of the label rules and not of the classifier whose scores "
        "these are.",
        [] if pictures else ["It cannot be told: the model was not trained here."],
        pictures=pictures,
    )


def markers(seen: Seen) -> Part:
    """Genes that are higher in a type than in all other cells."""
    rows: list[list[Any]] = []
    sentences = []
    types = np.unique(seen.predicted)
    try:
        for name in types if len(types) > 1 else []:
            rows += _markers_of(seen, name)
    except InputError as error:
        sentences.append(f"It cannot be told: {error}.")
    if len(types) == 1:
        sentences.append(
            "All cells are of one predicted type, so that there is nothing to compare."
        )
    columns = [
        "type",
        "gene",
        "log2 fold change",
        "probability",
        "found in type",
        "found elsewhere",
    ]
    return Part(
        "Markers",
        f"By differential_expression: expression that the model decodes, of {N_DRAWS} draws of the "
        "cells of a predicted type against as many of all others. Shown are the surest genes that "
        f"are higher in the type and found in {SEEN_IN:.0%} of its cells: the median log2 fold "
        "change, the probability of a change beyond 0.25, and the shares of cells with a count. "
        "Types were predicted from the same counts, so that this describes them and is no proof of "
        "them; known markers that are missing are a reason to doubt a type.",
        sentences,
        [Table("Markers of predicted types", columns, rows)] if rows else [],
    )


def _markers_of(seen: Seen, name: str) -> Iterator[list[Any]]:
    table = seen.model.differential_expression(
        idx1=seen.predicted == name, n_samples_overall=N_DRAWS, silent=True, seed=seen.model.seed
    )
    shares = ["non_zeros_proportion1", "non_zeros_proportion2"]
    table = table[(table["lfc_median"] > 0) & (table[shares[0]] >= SEEN_IN)].head(N_MARKERS)
    for gene, row in table[["lfc_median", "proba_de", *shares]].iterrows():
        yield [name, gene, *row]


def settings(seen: Seen) -> Part:
    """Settings, seed and versions: what it takes to do it again."""
    model = seen.model
    given = {"seed": model.seed, "epochs": model.n_epochs_trained, "labels by": model.label_method}
    tables = {
        "Model": {**given, **model.vae_arguments},
        "Training": model.training_settings,
        "Versions": versions(),
    }
    return Part(
        "Settings and versions",
        "Same cells, settings, seed, versions and number of threads give the same numbers.",
        tables=[
            Table(title, ["name", "value"], [[k, str(v)] for k, v in values.items()])
            for title, values in tables.items()
            if values
        ],
    )


PARTS: tuple[Callable[[Seen], Part], ...] = (
    what_was_given,
    maps,
    leak,
    held_out_labels,
    cells_by_type,
    cells_to_look_at,
    losses,
    markers,
    settings,
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def short_names(names: set[str]) -> dict[str, str]:
    """Each name with its middle left out, if it is long; as they are where some would be alike."""
    half = LONGEST_NAME // 2
    short = {n: n if len(n) <= LONGEST_NAME else f"{n[:half]}...{n[-half:]}" for n in names}
    return short if len(set(short.values())) == len(names) else {n: n for n in names}


def _shortened(names: np.ndarray) -> np.ndarray:
    """Each of an array of names, if it is long."""
    short = short_names(set(names))
    return np.array([short[name] for name in names], dtype=object)

"""Pictures: what is drawn is what was counted by hand, in the axes that were given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pyro_scanvi import InputError, pl
from pyro_scanvi.training.history import History

TYPES = pd.Series(["T", "B", "T", "T", "B", "NK"], dtype="category")
BATCHES = [1, 1, 1, 1, 2, 2]  # numbers
SURE = np.array([0.9, 0.5, 0.7, 0.8, 0.6, 1.0])
POINTS = np.arange(12.0).reshape(6, 2)
HISTORY = History(
    {
        "epoch": [0, 0, 1, 1],
        "split": ["train", "validation"] * 2,
        "elbo": [-9.0, -8.0, -7.0, -6.0],
        "accuracy": [0.5, np.nan, 0.75, np.nan],
    }
)
LEAK = pd.Series({"B": 0.5, "T": 0.9}, name="leak")
PICTURES = {
    "confidence": (pl.confidence, (TYPES, SURE)),
    "reliability": (pl.reliability, (SURE > 0.6, SURE)),
    "confusion": (pl.confusion, (TYPES, TYPES[::-1])),
    "history": (pl.history, (HISTORY,)),
    "leak": (pl.leak, (LEAK,)),
    "composition": (pl.composition, (TYPES, BATCHES)),
    "map of names": (pl.map_of_names, (POINTS, TYPES)),
    "map of shares": (pl.map_of_shares, (POINTS, SURE)),
}


@pytest.fixture
def ax() -> Axes:
    """Of a figure that pyplot does not know."""
    return Figure().add_subplot()


def names(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


@pytest.mark.parametrize(("draw", "given"), PICTURES.values(), ids=PICTURES)
def test_axes_that_are_given_come_back_and_without_them_a_figure_is_made(draw, given, ax):
    plt.close("all")
    assert draw(*given, ax=ax) is ax
    assert plt.get_fignums() == []
    made = draw(*given)
    assert [made.figure.number] == plt.get_fignums()
    made.figure.canvas.draw()
    plt.close("all")


def test_all_pictures_are_tried():
    public = {v for k, v in vars(pl).items() if getattr(v, "__module__", "") == pl.__name__}
    drawing = {f for f in public if "ax" in f.__annotations__ and f.__name__[0] != "_"}
    assert drawing == {draw for draw, _ in PICTURES.values()}


def test_confidence(ax):
    """Quartiles of T are those of .7, .8, .9; types lie from above."""
    pl.confidence(TYPES, SURE, ax=ax)
    assert names(ax.get_yticklabels()) == ["B (2)", "NK (1)", "T (3)"]
    of_type = [line.get_xydata() for line in ax.lines]
    boxes = [points for points in of_type if len(points) == 5]
    assert [b[:, 0].min() for b in boxes] == pytest.approx([0.525, 1, 0.75])
    assert [b[:, 0].max() for b in boxes] == pytest.approx([0.575, 1, 0.85])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_reliability(ax):
    """Of four that are sure by .9 three are right, of two by .5 none; Wilson's interval."""
    sure, correct = np.repeat([0.9, 0.5], [4, 2]), np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    pl.reliability(correct, sure, ax=ax)
    diagonal, points = ax.lines[0].get_xydata(), ax.lines[1].get_xydata()
    assert diagonal.tolist() == [[0, 0], [1, 1]]
    np.testing.assert_allclose(points, [[0.5, 0], [0.9, 0.75]])
    _, of_four = ax.collections[0].get_segments()
    z, n, p = 1.959964, 4, 0.75
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = np.array([middle - half, middle + half]) / (1 + z**2 / n)
    np.testing.assert_allclose(of_four[:, 1], expected, rtol=1e-5)


def test_confusion(ax):
    """Of three B one is taken for T, and nothing is called NK but one T."""
    truth, predicted = ["B", "B", "T", "B", "T"], ["B", "T", "T", "B", "NK"]
    pl.confusion(truth, predicted, ax=ax)
    image = ax.images[0].get_array()
    np.testing.assert_allclose(image, [[2 / 3, 0, 1 / 3], [0, 0, 0], [0, 0.5, 0.5]])
    assert names(ax.get_yticklabels()) == names(ax.get_xticklabels()) == ["B", "NK", "T"]
    told = {text.get_position(): text.get_text() for text in ax.texts}
    assert told == {(0, 0): "2", (2, 0): "1", (1, 2): "1", (2, 2): "1"}


def test_of_many_labels_no_cells_are_counted_in_the_picture(ax):
    many = range(pl.MOST_NUMBERS + 1)
    assert len(pl.confusion(many, many, ax=ax).texts) == 0
    assert len(ax.get_xticks()) == len(many)


def test_history(ax):
    pl.history(HISTORY, ax=ax)
    curves = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert curves == {"train": [[1, -9], [2, -7]], "validation": [[1, -8], [2, -6]]}
    assert ax.get_title() == "ELBO, nats per cell"
    scored = pl.history(HISTORY, "accuracy", ax=Figure().add_subplot())
    assert [line.get_label() for line in scored.lines] == ["train"]


def test_there_is_no_such_curve(ax):
    with pytest.raises(InputError, match=r"'acuracy' is not a column .* mean 'accuracy'"):
        pl.history(HISTORY, "acuracy", ax=ax)
    with pytest.raises(InputError, match=r"history is empty.*train"):
        pl.history(History(), ax=ax)
    assert not ax.lines


def test_leak(ax):
    pl.leak(LEAK, ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.9]
    assert names(ax.get_yticklabels()) == ["B", "T"]
    assert ax.lines[0].get_xdata() == [0.5, 0.5]


def test_composition(ax):
    """Batch 1 has a B and three T, batch 2 a B and an NK; bars of a batch follow each other."""
    pl.composition(TYPES, BATCHES, colours={"B": "red", "NK": "blue", "T": "lime"}, ax=ax)
    assert names(ax.get_yticklabels()) == ["1 (4)", "2 (2)"]
    bars = [
        (round(bar.get_y()), to_hex(bar.get_facecolor()), bar.get_x(), bar.get_width())
        for bar in ax.patches
        if bar.get_width()
    ]
    assert sorted(bars) == [
        (0, to_hex("lime"), 0.25, 0.75),
        (0, to_hex("red"), 0, 0.25),
        (1, to_hex("blue"), 0.5, 0.5),
        (1, to_hex("red"), 0, 0.5),
    ]
    assert names(ax.get_legend().texts) == ["B", "NK", "T"]


def test_map_of_names(ax):
    colours = {"T": "lime", "none": "black", "B": "red", "NK": "blue"}
    pl.map_of_names(POINTS, TYPES, colours=colours, ax=ax)
    drawn = ax.collections[0]
    np.testing.assert_array_equal(drawn.get_offsets(), POINTS)
    assert [to_hex(c) for c in drawn.get_facecolors()] == [to_hex(colours[t]) for t in TYPES]
    assert names(ax.get_legend().texts) == ["T", "B", "NK"]


def test_map_of_shares(ax):
    drawn = pl.map_of_shares(POINTS, SURE, ax=ax).collections[0]
    np.testing.assert_array_equal(drawn.get_offsets(), POINTS)
    assert drawn.get_array().tolist() == SURE.tolist() and drawn.get_clim() == (0, 1)


def test_colours_are_of_names():
    many = [str(i) for i in range(120)]
    chosen = pl.palette(["B", "Unknown", "T"], "Unknown")
    assert chosen["Unknown"] == "lightgrey" and len(set(chosen.values())) == 3
    assert set(pl.palette(many)) == {*many, ""}  # colours come again
    with pytest.raises(InputError, match="'NK' is not among the colours"):
        pl.map_of_names(POINTS, TYPES, colours={"T": "lime", "B": "red"}, ax=Figure().add_subplot())


@pytest.mark.parametrize("name", [n for n in PICTURES if len(PICTURES[n][1]) == 2])
def test_lengths_that_differ_are_refused(name, ax):
    draw, (one, other) = PICTURES[name]
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        draw(one, other[:5], ax=ax)
    assert not ax.has_data()

"""The notebooks keep to their format, and what compares their outputs tells what differs.

``make notebooks`` executes them; here they are read.
"""

import re
from pathlib import Path

import nbformat
import pytest

from tests.scripts import ROOT, load

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
N_NOTEBOOKS = 9  # how many there are to be
HIDDEN = {"source_hidden": True, "outputs_hidden": True}
DRAWS = re.compile(r"plt\.show\(\)|plot|figure|imshow|scatter|hist\(|render_model|subplots|draw")
UNSTABLE = re.compile(r"0x[0-9a-f]{6,}|/(?:home|tmp|root|work|usr)/|Traceback|Warning:")


execute = load("notebooks/execute.py")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- the format ---------------------------------------------------------------------------------


def test_there_are_as_many_as_are_to_be():
    assert [p.name[:3] for p in NOTEBOOKS] == [f"{i:02}_" for i in range(1, N_NOTEBOOKS + 1)]


@each_notebook
def test_a_notebook_opens_with_a_question_and_its_run_time(path):
    first = read(path).cells[0]
    title, *rest = first.source.splitlines()
    assert first.cell_type == "markdown"
    assert title.startswith("# ") and title.endswith("?")
    seconds = re.search(r"Runs in about (\d+) seconds on two cores\.", " ".join(rest))
    assert seconds and int(seconds.group(1)) < 180


@each_notebook
def test_three_exercises_with_folded_solutions_end_a_notebook(path):
    cells = read(path).cells
    start = next(i for i, c in enumerate(cells) if "## Exercises" in c.source.splitlines())
    text = "\n".join(c.source for c in cells[start:] if c.cell_type == "markdown")
    assert re.findall(r"^\*\*(\d)\.\*\*", text, re.MULTILINE) == ["1", "2", "3"]
    solutions = [c for c in cells[start:] if c.cell_type == "code"]
    heads = [c.source.splitlines()[0] for c in solutions]
    assert [h for h in heads if h.startswith("# Solution")] == [
        f"# Solution {i}" for i in (1, 2, 3)
    ]
    assert all(c.metadata["jupyter"] == HIDDEN for c in solutions)
    assert all("hide-cell" in c.metadata["tags"] for c in solutions)


@each_notebook
def test_a_notebook_shows_pictures(path):
    """At least two cells, as far as their source tells."""
    assert sum(bool(DRAWS.search(c.source)) for c in code(read(path))) >= 2


@each_notebook
def test_text_alone_is_stored(path):
    """As ``execute.py --store`` writes it, so that a diff shows what changed."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook == execute.stripped(notebook)
    assert path.stat().st_size < 100_000
    said = [execute.text(cell) for cell in code(notebook)]
    assert any(said), "it was never executed"
    assert [x for x in said if UNSTABLE.search(x)] == []
    errors = [o for c in code(notebook) for o in c.outputs if o.get("name") == "stderr"]
    assert errors == []


@each_notebook
def test_cells_are_short_and_known_by_name(path):
    cells = read(path).cells
    assert max(len(c.source.splitlines()) for c in cells if c.cell_type == "code") <= 25
    assert all(len(c.id) <= 30 for c in cells)
    known = {"hide-cell", execute.NUMBERS_VARY, execute.OUTPUT_VARIES}
    assert set().union(*(c.metadata.get("tags", []) for c in cells)) <= known


# ---- the comparison -----------------------------------------------------------------------------

TABLE = """            accuracy   low  high
scANVI          0.80  0.75  0.85
CD4+/CD25 T     0.10 -0.02  0.22"""


def test_equal_texts_do_not_differ():
    assert execute.differences(TABLE, TABLE) == []


def test_numbers_may_be_close():
    """|a - b| <= .05 + .25 |b|, of what is stored."""
    assert execute.differences(TABLE, TABLE.replace("0.80", "1.04").replace("-0.02", "0.03")) == []
    assert execute.differences("4", "5") == [] and execute.differences("1e-3", "0.05") == []
    [difference] = execute.differences(TABLE, TABLE.replace("0.80", "1.06"))
    assert difference == "after 'low high scANVI': 0.8 is stored, 1.06 came"
    assert execute.differences("a -0.5", "a 0.5") and execute.differences("100", "1e5")


@pytest.mark.parametrize("new", ["scVI", "scANVI's", ""])
def test_a_changed_word_differs(new):
    assert len(execute.differences(TABLE, TABLE.replace("scANVI", new))) == 1


def test_digits_of_a_name_are_no_number():
    assert execute.differences("CD25", "CD26") and execute.differences("batch_2", "batch_1")
    assert execute.differences("v1.2", "v1.1")


def test_a_number_is_no_word():
    assert execute.differences("0.5", "nan") == ["after '': 0.5 is stored, 'nan' came"]


def test_more_or_less_text_differs():
    assert execute.differences("0.5", "0.5 0.5") == ["after '0.5': nothing is stored, 0.5 came"]
    assert execute.differences("0.5 (20 cells)", "0.5") != []


def test_widths_do_not_count():
    assert execute.differences("a   0.5\n-------", "a 0.49\n----") == []


def test_tags_let_vary():
    assert execute.differences("a 1", "a 9", [execute.NUMBERS_VARY]) == []
    assert execute.differences("a 1", "b 1", [execute.NUMBERS_VARY]) != []
    assert execute.differences("a 1", "", [execute.OUTPUT_VARIES]) == []


# ---- execution ----------------------------------------------------------------------------------

PICTURE = {"text/plain": "<Figure size 640x480 with 1 Axes>", "image/png": "iVBOR"}


def notebook(*sources: str, outputs=()) -> nbformat.NotebookNode:
    """Of code cells, each with one of `outputs`."""
    new = nbformat.v4.new_notebook(metadata={"widgets": {}})
    for i, source in enumerate(sources):
        cell = nbformat.v4.new_code_cell(source, id=f"cell-{i}", execution_count=i + 1)
        cell.outputs = list(outputs[i]) if i < len(outputs) else []
        cell.metadata = nbformat.from_dict({"tags": ["numbers-vary"], "execution": {"now": "5 pm"}})
        new.cells.append(cell)
    return new


def test_what_is_stored_is_text():
    printed = [nbformat.v4.new_output("stream", name="stdout", text=t) for t in ("a\n", "b\n")]
    drawn = nbformat.v4.new_output("display_data", data=PICTURE)
    value = nbformat.v4.new_output("execute_result", data={"text/html": "<p>", "text/plain": "c"})
    only_html = nbformat.v4.new_output("display_data", data={"text/html": "<p>"})
    stored = execute.stripped(notebook("f()", outputs=[[*printed, drawn, value, only_html]]))
    [cell] = stored.cells
    assert [o.output_type for o in cell.outputs] == ["stream", "display_data", "execute_result"]
    assert execute.text(cell) == f"a\nb\n{PICTURE['text/plain']}\nc"
    assert "iVBOR" not in nbformat.writes(stored) and "<p>" not in nbformat.writes(stored)
    assert cell.metadata == {"tags": ["numbers-vary"]} and cell.execution_count is None
    assert stored.metadata == execute.METADATA and cell.id == "cell-0"
    assert execute.stripped(stored) == stored


@pytest.mark.slow
def test_a_notebook_is_executed_stored_and_compared(tmp_path):
    path, copies = tmp_path / "01_a.ipynb", tmp_path / "copies"
    nbformat.write(notebook("a = 1", "print('seen', a)\na + 1"), path)
    [wrong] = execute.execute(path, copies).wrong
    assert wrong == "cell 'cell-1' after '': nothing is stored, 'seen' came"
    assert execute.execute(path, copies, store=True).wrong == []
    assert execute.text(read(path).cells[1]) == "seen 1\n2"
    result = execute.execute(path, copies)
    assert result.wrong == [] and result.cpu_seconds > 0 and "01_a.ipynb" in str(result)
    assert read(copies / path.name).cells[1].execution_count == 2


def test_a_cell_that_fails_is_told_and_nothing_is_stored(tmp_path):
    path = tmp_path / "01_a.ipynb"
    nbformat.write(notebook("1 / 0"), path)
    before = path.read_bytes()
    [wrong] = execute.execute(path, tmp_path / "copies", store=True).wrong
    assert "ZeroDivisionError" in wrong
    assert path.read_bytes() == before and not (tmp_path / "copies" / path.name).exists()


def test_notebooks_are_chosen_by_how_their_names_start(tmp_path):
    for name in ("01_a.ipynb", "02_b.ipynb"):
        (tmp_path / name).touch()
    names = [p.name for p in execute.chosen(["notebooks/02"], tmp_path)]
    assert names == ["02_b.ipynb"] and len(execute.chosen([], tmp_path)) == 2
    with pytest.raises(SystemExit, match="no notebook is called 03"):
        execute.chosen(["03"], tmp_path)

"""Draw docs/architecture.svg: ``python docs/architecture.py`` reads the layers and the imports.

Boxes are the folders of the package, in the layers that ``tests/test_architecture.py`` holds them
to. An arrow is an import that no chain of other imports implies; what everybody reads lies on the
floor, without arrows. Numbers are the way of a minibatch. A test compares the picture with what is
drawn anew.
"""

import ast
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import test_architecture as held  # noqa: E402

PICTURE = Path(__file__).parent / "architecture.svg"
PACKAGE = ROOT / "pyro_scanvi"
WIDTH, BOX, HIGH, GAP = 960, 218, 76, 40
CHARACTERS = 30  # of a line in a box
FLOOR = 2  # so many layers from below are for everybody, and their arrows are left out
ASIDE = {"scvi_tools", "storage"}  # of the straight way down
NUMBER = {"data": "1", "model": "2, 3", "training": "4", "posterior": "5", "estimator": "0, 6"}
CAPTION = (
    "An arrow is an import; those into the two lowest rows are left out. The way of a minibatch: "
    "0 AnnData, 1 Cells, 2 guide and model, 3 loss, 4 a step, 5 arrays, 6 AnnData."
)
STYLE = """
  text { font: 12px sans-serif; fill: #222 }
  .name { font: bold 14px sans-serif }
  .box { fill: #eef3fb; stroke: #4a6fa5 }
  .number { font: bold 12px sans-serif; fill: #b3541e; text-anchor: end }
  .arrow { fill: none; stroke: #9aa7b8; stroke-width: 1.2; marker-end: url(#head) }
"""


@dataclass(frozen=True)
class Box:
    """A folder of the package, or a file at its top, and where it is drawn."""

    name: str
    says: str
    x: float
    y: float


def layers() -> list[list[str]]:
    """Names of rooms from above; the package's own ``__init__`` is the door, not a room."""
    return [sorted(layer - {"__init__"}) for layer in held.LAYERS]


def first_sentence(room: str) -> str:
    """Of the docstring of a room, up to its colon."""
    path = PACKAGE / f"{room}.py"
    path = path if path.exists() else PACKAGE / room / "__init__.py"
    line = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()[0]
    return line.split(":")[0].rstrip(".")


def imports() -> dict[str, set[str]]:
    """Which rooms a room imports from."""
    rooms = {room for layer in layers() for room in layer}
    found: dict[str, set[str]] = {}
    for room in rooms:
        path = PACKAGE / room
        names = held.imported(path if path.is_dir() else path.with_suffix(".py"))
        parts = [name.split(".") for name in names if name.startswith("pyro_scanvi.")]
        found[room] = {p[1] for p in parts if p[1] in rooms} - {room}
    return found


def reached(room: str, edges: dict[str, set[str]]) -> set[str]:
    """All that a room imports, directly or by others."""
    return edges[room].union(*(reached(other, edges) for other in edges[room]))


def arrows() -> list[tuple[str, str]]:
    """The imports above the floor that no chain of other imports implies."""
    floor = {room for layer in layers()[-FLOOR:] for room in layer}
    edges = {room: others - floor for room, others in imports().items()}
    return sorted(
        (room, other)
        for room, others in edges.items()
        for other in others
        if not any(other in reached(between, edges) for between in others - {other})
    )


def boxes() -> dict[str, Box]:
    """Each layer is a row, in the middle of the picture."""
    found = {}
    for i, layer in enumerate(layers()):
        step = BOX + 16
        left = (WIDTH - step * len(layer) + 16) / 2
        for j, room in enumerate(layer):
            x = left + (j + (room in ASIDE)) * step
            found[room] = Box(room, first_sentence(room), x, 50 + i * (HIGH + GAP))
    return found


def arrow(start: Box, end: Box) -> str:
    """A curve from the foot of a box to the head of another."""
    x, y = start.x + BOX / 2, start.y + HIGH
    to_x, to_y = end.x + BOX / 2, end.y - 3
    bend = (to_y - y) / 2
    curve = f"M{x:g} {y:g} C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"
    return f'<path class="arrow" d="{curve}"><title>{start.name} → {end.name}</title></path>'


def drawn(box: Box) -> str:
    """A box with its name, what it is for, and its place on the way of a minibatch."""
    says = textwrap.wrap(box.says, CHARACTERS)[:3]
    lines = [
        f'<rect class="box" x="{box.x:g}" y="{box.y:g}" width="{BOX}" height="{HIGH}" rx="6"/>',
        f'<text class="name" x="{box.x + 10:g}" y="{box.y + 20:g}">{box.name}</text>',
        f'<text class="number" x="{box.x + BOX - 8:g}" y="{box.y + 20:g}">'
        f"{NUMBER.get(box.name, '')}</text>",
    ]
    for i, line in enumerate(says):
        y = box.y + 38 + 14 * i
        lines.append(f'<text x="{box.x + 10:g}" y="{y:g}">{escape(line)}</text>')
    return "\n".join(lines)


def picture() -> str:
    """The whole picture."""
    places = boxes()
    height = max(box.y for box in places.values()) + HIGH + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img">'
    )
    marker = (
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#9aa7b8"/></marker></defs>'
    )
    title = "<title>The folders of pyro_scanvi, and which imports from which</title>"
    paper = f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>'
    caption = "\n".join(
        f'<text x="16" y="{20 + 15 * i}">{line}</text>'
        for i, line in enumerate(textwrap.wrap(CAPTION, 150))
    )
    lines = [arrow(places[a], places[b]) for a, b in arrows()]
    parts = [head, title, f"<style>{STYLE}</style>", marker, paper, caption, *lines]
    return "\n".join([*parts, *map(drawn, places.values()), "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")

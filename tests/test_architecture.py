"""The architecture: a folder is one idea, and imports only from folders below it."""

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pyro_scanvi
from pyro_scanvi import SCANVI
from pyro_scanvi.posterior.trained import Trained

ROOT = Path(pyro_scanvi.__file__).parent
LAYERS = [  # from above; what stands in one line does not know the others of it
    {"app", "sklearn", "__init__"},
    {"criticism", "experiments", "pl", "testing"},
    {"estimator"},
    {"training", "posterior", "surgery", "extensions"},
    {"model"},
    {"scvi_tools"},
    {"data"},
    {"annotation", "storage"},
    {"datasets", "metrics", "validation"},
    {"names", "threads"},
]
UNKNOWN_TO = {  # the edges that the inside is kept from
    "model": {"anndata", "pandas", "lightning", "sklearn", "scanpy"},
    "training": {"anndata", "scanpy"},
    "model/networks.py": {"pyro", "numpy"},
    "data/minibatches.py": {"pyro", "anndata", "lightning"},
}


def names(nodes) -> set[str]:
    """What import statements import: ours as "pyro_scanvi.module", others by their package."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pyro_scanvi":
            found |= {f"pyro_scanvi.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
    return found


def imported(path: Path) -> set[str]:
    """What a file, or all files of a folder, import, inside functions too."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return names(n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))))


def room(path: Path) -> str:
    """The folder of a file, or its own name where it lies at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


def test_every_room_has_its_layer():
    assert set().union(*LAYERS) == {room(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = room(path)
    layer = next(i for i, members in enumerate(LAYERS) if own in members)
    below = {own}.union(*LAYERS[layer + 1 :])
    ours = {n.split(".")[1] for n in imported(path) if n.startswith("pyro_scanvi.")}
    assert ours <= below


@pytest.mark.parametrize("place", UNKNOWN_TO)
def test_the_inside_does_not_know_the_edges(place):
    packages = {name.split(".")[0] for name in imported(ROOT / place)}
    assert not packages & UNKNOWN_TO[place]


@pytest.mark.parametrize("theme", Trained.__subclasses__())
def test_questions_read_of_a_model_what_is_trained_alone(theme):
    """So that no question asks another."""
    nodes = [*ast.walk(ast.parse(inspect.getsource(theme)))]
    names = [n for n in nodes if isinstance(n, ast.Name) and n.id == "self"]
    read = [n.attr for n in nodes if isinstance(n, ast.Attribute) and n.value in names]
    assert len(read) == len(names), "self is not handed on"
    assert set(read) <= {"module", "fields", "adata", "encoded", "consensus", "label_method"}
    assert theme in SCANVI.__bases__


def test_no_file_imports_itself_in_a_circle():
    """Not even for types."""
    modules = {".".join(("pyro_scanvi", *p.relative_to(ROOT).with_suffix("").parts)) for p in FILES}
    graph = {}
    for path in FILES:
        own = ".".join(("pyro_scanvi", *path.relative_to(ROOT).with_suffix("").parts))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        graph[own] = {n.module for n in froms} | {
            f"{n.module}.{a.name}" for n in froms for a in n.names
        }
        graph[own] &= modules
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)

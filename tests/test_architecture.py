"""The direction of imports: each module knows only those of the layers before its own."""

import ast
from pathlib import Path

import pytest

import pyro_scanvi

FOLDER = Path(pyro_scanvi.__file__).parent
LAYERS = [
    {"names", "data", "distributions", "networks", "metrics", "datasets", "threads", "baselines"},
    {"checks"},
    {
        "columns",
        "counts",
        "history",
        "storable",
        "likelihoods",
        "objective",
        "files",
        "pickles",
        "stores",
        "nonfinite",
        "course",
        "comparisons",
    },
    {"scanvae", "saving", "scores", "checkpoints", "callbacks", "differential", "plotting"},
    {"plan", "pretraining", "posterior", "interop", "growing"},
    {"trainer", "training_plan", "freezing", "expression", "correlation", "elbo", "importance"},
    {"training", "fields"},  # fields read the registry of a saved scvi-tools model too
    {"query", "asking", "scvi_names", "summary"},
    {"scanvi"},
    {"cli", "__init__"},
]
ONLY = {  # where a layer would allow more
    "likelihoods": {"distributions", "networks"},
    "objective": {"data"},
    "checks": {"names"},
    "columns": {"checks", "names"},
    "counts": {"checks", "names", "threads"},
    "files": {"checks"},
    "pickles": {"checks", "files"},
    "stores": {"checks", "files"},
    "scanvae": {"checks", "data", "likelihoods", "networks"},
    "saving": {"checks", "files", "stores"},
    "comparisons": {"checks", "names"},
    "differential": {"checks", "comparisons"},
    "posterior": {"checks", "data", "likelihoods", "scanvae", "threads"},
    "expression": {"data", "likelihoods", "posterior", "scanvae"},
    "correlation": {"checks", "data", "likelihoods", "posterior", "scanvae"},
    "importance": {"data", "posterior", "scanvae"},
    "elbo": {"data", "objective", "posterior", "scanvae"},
    "plan": {"checks", "objective", "scanvae"},
    "pretraining": {"data", "objective", "scanvae"},
    "nonfinite": {"data"},
    "growing": {"checks", "likelihoods", "scanvae"},
    "freezing": {"checks", "growing", "scanvae"},
    "scvi_names": {"checks", "plan", "trainer"},
    "summary": {"data", "fields", "freezing", "names", "scanvae"},
    "query": {"checks", "columns", "fields", "growing", "names", "saving", "scanvae"},
}
LAZY = {("scanvae", "interop")}  # scanvae answers by scvi-tools' names through interop
UNKNOWN_TO = {  # the edges that these are kept from
    "networks": {"pyro", "anndata", "pandas", "numpy", "lightning"},
    "distributions": {"anndata", "pandas", "lightning"},
    "likelihoods": {"anndata", "pandas", "lightning"},
    "scanvae": {"anndata", "pandas", "lightning"},
    "objective": {"anndata", "pandas", "lightning"},
    "data": {"pyro", "anndata", "lightning"},
    "posterior": {"anndata", "lightning"},
    "importance": {"anndata", "pandas", "lightning"},
    "comparisons": {"pyro", "torch", "anndata", "lightning"},
    "differential": {"pyro", "torch", "anndata", "lightning"},
    "expression": {"anndata", "pandas", "lightning"},
    "correlation": {"anndata", "pandas", "lightning"},
    "elbo": {"anndata", "pandas", "lightning"},
    "growing": {"anndata", "pandas", "lightning"},
    "freezing": {"anndata", "pandas"},
    "storable": {"pyro", "torch", "anndata", "pandas", "lightning"},
    "history": {"pyro", "torch", "anndata", "numpy", "lightning"},
}
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))


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


def imports(module: str) -> tuple[set[str], set[str]]:
    """Ours of the top of a module, and ours inside its functions."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    sources = names(tree.body), names(n for f in functions for n in ast.walk(f))
    return tuple({n.split(".")[1] for n in s if n.startswith("pyro_scanvi.")} for s in sources)


def test_every_module_has_its_layer():
    assert sorted(m for layer in LAYERS for m in layer) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    layer = next(i for i, members in enumerate(LAYERS) if module in members)
    allowed = ONLY.get(module, set().union(*LAYERS[:layer]))
    found, lazy = imports(module)
    assert found <= allowed
    assert {(module, name) for name in lazy} <= LAZY


@pytest.mark.parametrize("module", UNKNOWN_TO)
def test_the_inside_does_not_know_the_edges(module):
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    packages = {name.split(".")[0] for name in names(ast.walk(tree))}
    assert not packages & UNKNOWN_TO[module]

"""The scripts that made benchmarks/RESULTS.md start, and their rows can be made."""

import runpy
import sys
from pathlib import Path

import pytest

from pyro_scanvi import SCANVI
from tests.examples import SMALL, simulated

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_says_how_it_is_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and "--" in capsys.readouterr().out


def test_results_name_scripts_that_are_there():
    text = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert {s.name for s in SCRIPTS} == {s.name for s in SCRIPTS if f"benchmarks/{s.name}" in text}


def test_every_extension_of_the_benchmark_is_made():
    rows = runpy.run_path(str(FOLDER / "extensions.py"))["ROWS"]
    adata = simulated(30)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    for row in rows.values():
        assert SCANVI(adata, **SMALL, **row.model).module.n_labels == 3

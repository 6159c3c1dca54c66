"""The scripts that made benchmarks/RESULTS.md start, and their rows can be made."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pyro_scanvi import ELBO, SCANVAE, SCANVI, Cells
from pyro_scanvi.training.settings import Plan
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


def test_the_loss_by_hand_is_that_of_the_package(monkeypatch):
    """The same draws, the same loss: what is timed beside us does the same work."""
    monkeypatch.syspath_prepend(str(FOLDER / "measuring"))
    by_hand = importlib.import_module("ours").loss_by_hand
    torch.manual_seed(0)
    vae = SCANVAE(n_input=30, n_labels=4, n_hidden=16, n_latent=3, linear_classifier=True)
    x = torch.poisson(3 * torch.rand(20, 30)) + 1
    cells = Cells.from_counts(x, label=torch.arange(20) % 5 - 1)
    losses = []
    for loss in (by_hand, lambda vae, cells: ELBO()(vae, Plan()).parts(cells).loss):
        torch.manual_seed(1)
        losses.append(loss(vae, cells))
    torch.testing.assert_close(*losses)

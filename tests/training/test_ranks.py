"""Several processes that train one model: a step, and a run, are those of one process."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.data.minibatches import MinibatchSampler, Share
from pyro_scanvi.model.networks import BatchNorm
from pyro_scanvi.training import checkpoints
from pyro_scanvi.training.ranks import Processes, gathering
from tests.examples import simulated, small_model
from tests.test_readme import ROOT
from tests.training import together
from tests.training.together import in_processes, srun, torchrun

PAGE = ROOT / "docs" / "many_machines.md"


# ---- what needs no second process ---------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_shares_are_the_larger_minibatch(balanced, n):
    label = np.where(np.arange(100) % 3, -1, np.arange(100) % 2)
    settings = {"seed": 4, "balanced": balanced}
    whole = list(MinibatchSampler(label, 7 * n, **settings))
    parts = [list(MinibatchSampler(label, 7, share=Share(r, n), **settings)) for r in range(n)]
    for minibatch, *shares in zip(whole, *parts, strict=True):
        assert sorted(np.concatenate(shares)) == sorted(minibatch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 7


def test_batch_norm_of_all_processes():
    """Two of them, played one after the other, against torch's own on the rows of both."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 5, 3).double(), 3 + 2 * torch.randn(2, 4, 3).double()]
    norms = [BatchNorm(3).double() for _ in range(3)]
    told: list[torch.Tensor] = []
    with gathering(norms[0], lambda row: told.append(row) or row.unsqueeze(0)):
        for part in parts:
            norms[0](part)
    whole = torch.cat([part.reshape(-1, 3) for part in parts])
    expected = norms[1](whole)
    rows = torch.stack(told).requires_grad_()  # as what is gathered has
    with gathering(norms[2], lambda row: rows):
        found = norms[2](parts[0])
    torch.testing.assert_close(found.reshape(-1, 3), expected[:10])
    assert found.requires_grad and not any(b.requires_grad for b in norms[2].buffers())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norms[2], name), getattr(norms[1], name))


class Foreign(SCANVAE):
    """A batch norm that would see the cells of one process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = torch.nn.BatchNorm1d(3)


REFUSED = {
    "no launcher": (None, {}, r"needs a launcher .*torchrun --standalone --nproc-per-node=2"),
    "its number": (None, {"devices": 4}, r"--nproc-per-node=4 train\.py, or by srun"),
    "other devices": (torchrun, {"devices": 3}, "devices=3, but the launcher started 2"),
    "a list": (torchrun, {"devices": [0]}, r"devices=\[0\], but the launcher started 2"),
    "of srun": (srun, {"devices": 1}, "devices=1, but the launcher started 2"),
    "unknown": (torchrun, {"strategy": "fsdp"}, "strategy='fsdp'"),
    "few to score": (torchrun, {"validation_size": 0.02}, "1 cells to score make minibatches of 1"),
}


@pytest.mark.parametrize(("launcher", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(launcher, arguments, message, monkeypatch):
    for name, value in (launcher(0, 2, 1) if launcher else {}).items():
        monkeypatch.setenv(name, value)
    model = small_model(simulated())
    with pytest.raises(InputError, match=message):
        model.train(1, **{"strategy": "ddp", "progress_bar": False} | arguments)
    assert not len(model.history)


def test_each_minibatch_has_a_cell_for_each_process():
    for n_cells, batch_size in ((6, 1), (5, 2), (0, 9)):
        Processes(2).check_smallest(n_cells, batch_size, "to score")
    with pytest.raises(InputError, match="5 cells to score make minibatches of 1, and 2 processes"):
        Processes(2).check_smallest(5, 1, "to score")


def test_foreign_batch_norms_are_refused(monkeypatch):
    for name, value in torchrun(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    adata = simulated()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    with pytest.raises(InputError, match="norm is a BatchNorm1d, whose statistics"):
        SCANVI(adata, module_class=Foreign).train(1, strategy="ddp")


# ---- a step -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Of each of two processes."""
    return in_processes(tmp_path_factory.mktemp("steps"), together.steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", together.STEPS)
def test_a_step_is_that_of_one_process(steps, name, monkeypatch):
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", together.even_noise)
    expected = together.step(name)
    assert len(steps) == 2 and expected["grads"]
    for found in steps:
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11, equal_nan=True)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder):
    """Of each of two processes."""
    return in_processes(folder, together.runs, folder)


@pytest.mark.slow
def test_a_run_is_that_of_one_process(runs, monkeypatch):
    """Of twice the minibatch; and both end with the same weights, to the bit."""
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", together.even_noise)
    expected = pd.DataFrame(together.exact_run(32).history)
    for run in runs:
        pd.testing.assert_frame_equal(run["exact"]["history"], expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "resumed", "early", "not finite", "exact"])
def test_processes_end_alike(runs, name):
    digests = [run[name]["digest"] for run in runs]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_resumed_to_the_bit(runs):
    """Each process with its own dropout and draws."""
    for run in runs:
        assert run["resumed"]["digest"] == run["whole"]["digest"]
        pd.testing.assert_frame_equal(run["resumed"]["history"], run["whole"]["history"])


@pytest.mark.slow
def test_one_process_does_not_resume_what_two_have_written(runs, folder):
    assert len(runs) == 2
    with pytest.raises(InputError, match=r"processes was 2, is None \(as many as"):
        together.noisy(4, folder / "whole", ckpt_path="last", strategy="auto")


@pytest.mark.slow
def test_early_stopping_is_one_decision(runs):
    first, second = (run["early"]["history"] for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert 0 < first["epoch"].max() < 49


@pytest.mark.slow
def test_one_process_writes(runs, folder):
    assert [run["files"] for run in runs][0] == ["whole/last.ckpt"]
    assert (folder / "saved by 0").is_dir() and not (folder / "saved by 1").exists()
    assert small_model(simulated(97)).load(folder / "saved by 0", simulated(97)).is_trained


@pytest.mark.slow
def test_processes_that_disagree_end(runs):
    for rank, run in enumerate(runs):
        assert f"seed is {rank} in process {rank} and {1 - rank} in process" in run["disagree"]


@pytest.mark.slow
def test_a_loss_of_one_process_ends_both(runs):
    for run in runs:
        assert "the loss is not finite in epoch 1" in run["not finite"]["error"]
        assert (
            "first at site 'odd', log probability, 1 cells (cell13)" in run["not finite"]["error"]
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank"), [(together.killed, 0), (together.interrupted, 1), (together.mistaken, 1)]
)
def test_the_end_of_one_is_an_error_in_the_other(tmp_path, how, rank):
    """No hang, and the checkpoint is whole."""
    codes = in_processes(tmp_path, together.ended_in, tmp_path, how, rank)
    assert all(isinstance(code, int) and code for code in codes)
    assert checkpoints.read(tmp_path / "last.ckpt").n_epochs == 2


@pytest.mark.slow
def test_the_script_of_the_page(tmp_path):
    """By torchrun itself."""
    (script,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "train.py").write_text(script.replace("max_epochs=20", "max_epochs=2"))
    started = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"
    subprocess.run([sys.executable, *started], cwd=tmp_path, check=True, timeout=120)
    assert checkpoints.read(tmp_path / "checkpoints" / "last.ckpt").n_epochs == 2
    assert (tmp_path / "model").is_dir()


@pytest.mark.slow
def test_as_srun_starts_them(tmp_path):
    first, second = in_processes(tmp_path, together.few_epochs, launcher=srun)
    assert first["digest"] == second["digest"] and len(first["history"]) == 4

"""What the tests of several processes run in each of them; started as torchrun or srun would."""

import hashlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pyro.distributions import Normal
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_scanvi import ELBO, IWAE, SCANVAE, SCANVI, Cells, InputError, PyroLoss
from pyro_scanvi.model.objective import ObjectiveParts
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.training.phases import TRAINING, WARM_START
from pyro_scanvi.training.ranks import ALONE, Processes, gathered, gathering
from pyro_scanvi.training.scores import EpochScores
from pyro_scanvi.training.settings import Plan
from tests.examples import random_cells, simulated, small_model, small_vae

QUIET = {"progress_bar": False, "strategy": "ddp"}


def torchrun(rank: int, n: int, port: int) -> dict[str, str]:
    """The environment that torchrun makes."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    others = {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "a test"}
    return {k: str(v) for k, v in (ours | others | address(port)).items()}


def srun(rank: int, n: int, port: int) -> dict[str, str]:
    """The variables of srun that Lightning reads."""
    ours = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_NTASKS": n}
    others = {"SLURM_NTASKS_PER_NODE": n, "SLURM_NNODES": 1, "SLURM_JOB_NAME": "atlas"}
    return {k: str(v) for k, v in (ours | others | address(port)).items()}


def address(port: int) -> dict:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def in_processes(folder: Path, function: Callable, *arguments, launcher=torchrun, n=2) -> list:
    """What the function gives in each of n processes; of one that failed, its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_scanvi"])
    paths = [folder / f"result{rank}.pt" for rank in range(n)]
    processes = [
        context.Process(target=_as_rank, args=(launcher(rank, n, port), path, function, *arguments))
        for rank, path in enumerate(paths)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    hang = [process.kill() for process in processes if process.exitcode is None]
    assert not hang, "a process hangs"
    return [
        torch.load(path, weights_only=False) if process.exitcode == 0 else process.exitcode
        for process, path in zip(processes, paths, strict=True)
    ]


def _as_rank(environment: dict, path: Path, function: Callable, *arguments) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    torch.save(function(*arguments), path)


# ---- one step -----------------------------------------------------------------------------------


def even_noise(shape, dtype, device) -> Tensor:
    """In the place of standard Normal noise: the same for each cell, whoever draws it."""
    return torch.linspace(-1, 1.5, shape[-1], dtype=dtype, device=device).expand(shape)


class BoundCompact:
    """A mean over cells beside the ELBO, as in docs/training.md."""

    kl_weight = None

    def __init__(self, vae, plan):
        self.vae, self.elbo = vae, ELBO()(vae, plan)

    def parts(self, cells: Cells) -> ObjectiveParts:
        parts = self.elbo.parts(cells)
        length = self.vae.q_z(cells).mean.square().sum(-1).mean()
        return replace(parts, loss=parts.loss + length)


SHARED_PI = {"label_noise": "dirichlet"}
PYROS = PyroLoss(TraceEnum_ELBO(max_plate_nesting=1))
FIRST, UNEVEN = [0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8]  # of eleven cells, those of the first process
STEPS = {  # of the model, the plan, which cells are labelled, those of the first process
    "layered": ({}, None, "mixed", UNEVEN),
    "the paper's": ({}, ELBO(), "mixed", UNEVEN),
    "several draws": ({}, ELBO(num_particles=3), "mixed", UNEVEN),
    "labels in one process": ({}, ELBO(), "first", FIRST),
    "labels of all": ({}, ELBO(), "all", UNEVEN),
    "no labels": ({}, ELBO(), "none", UNEVEN),
    "weights and sets": ({}, ELBO(), "sets", UNEVEN),
    "importance weighted": ({}, IWAE(num_particles=3), "mixed", UNEVEN),
    "Pyro's": ({}, PYROS, "mixed", UNEVEN),
    "one's own": ({}, BoundCompact, "mixed", UNEVEN),
    "a shared site": (SHARED_PI, ELBO(), "mixed", UNEVEN),
    "dispersion by label": ({"dispersion": "gene-label"}, ELBO(), "first", FIRST),
    "a latent library": (
        {
            "use_observed_lib_size": False,
            "library_log_means": [3.0],
            "library_log_vars": [0.3],
            "n_layers": 2,
        },
        ELBO(),
        "mixed",
        UNEVEN,
    ),
    "the warm start": ({}, "warm", "mixed", UNEVEN),
}


def union(vae: SCANVAE, labels: str) -> Cells:
    """Eleven cells, of a data set of fifty."""
    known = {"first": "all", "sets": "mixed"}.get(labels, labels)
    cells = random_cells(vae, known, n=11, n_obs=50)
    if labels == "first":
        cells.label[6:] = -1
    if labels != "sets":
        return cells
    evidence = cells.label_evidence(vae.n_labels)[0].clone()
    evidence[cells.index % 4 == 0, 0] = -1e20  # not the first label, whatever else
    weight = torch.linspace(0.5, 2, len(cells), dtype=cells.x.dtype)
    return replace(cells, evidence=evidence, weight=weight)


def taken(cells: Cells, positions: list[int]) -> Cells:
    """Some cells of a minibatch."""
    names = "x", "batch", "label", "index", "position", "evidence", "weight"
    given = {name: getattr(cells, name) for name in names}
    return replace(cells, **{k: v[positions] for k, v in given.items() if v is not None})


class Step(nn.Module):
    """A training step as a forward pass."""

    def __init__(self, module: LightningObjective):
        super().__init__()
        self.module = module

    def forward(self, cells: Cells) -> Tensor:
        return self.module.training_step(cells)


def step(name: str, processes: Processes = ALONE) -> dict:
    """Gradients, statistics of batch norms and scores after one step."""
    arguments, objective, labels, first = STEPS[name]
    vae = small_vae(dropout_rate=0.0, **arguments).double().train()
    cells = union(vae, labels)
    phase = WARM_START if objective == "warm" else TRAINING
    plan = Plan(objective=None if objective == "warm" else objective, classification_ratio=3.0)
    module = LightningObjective(vae, plan, phase, processes=processes)
    module.train_scores = EpochScores()
    forward: nn.Module = Step(module)
    with gathering(vae, gathered if processes.n > 1 else None):
        if processes.n > 1:
            forward = DistributedDataParallel(forward, find_unused_parameters=True)
            parts = first, [i for i in range(len(cells)) if i not in first]
            cells = taken(cells, parts[processes.rank])
        torch.manual_seed(1)  # of a site that all share
        forward(cells).backward()
    grads = {k: p.grad for k, p in vae.named_parameters() if p.grad is not None}
    scores = EpochScores.of_all(processes.each(module.train_scores)).mean()
    return {"grads": grads, "buffers": dict(vae.named_buffers()), "scores": scores}


def steps() -> dict[str, dict]:
    """Of this process, all of them."""
    torch.distributions.normal._standard_normal = even_noise
    distributed.init_process_group("gloo")
    n, rank = distributed.get_world_size(), distributed.get_rank()
    return {name: step(name, Processes(n, n, rank)) for name in STEPS}


# ---- whole runs ---------------------------------------------------------------------------------

EVERYTHING = {
    "pretrain_epochs": 1,
    "class_balanced": True,
    "n_samples_per_label": 9,
    "plan_kwargs": {
        "n_epochs_kl_warmup": 2,
        "gradient_clip_norm": 5.0,
        "reduce_lr_on_plateau": True,
        "lr_patience": 0,
        "lr_threshold": 1e6,
    },
}
EXACT = EVERYTHING | {"precision": "64-true", "progress_bar": False, "check_val_every_n_epoch": 2}


def digest(model: SCANVI) -> str:
    """Of the weights, to the bit."""
    tensors = model.module.state_dict().values()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def told(model: SCANVI) -> dict:
    return {"digest": digest(model), "history": pd.DataFrame(model.history)}


def exact_run(batch_size: int, **more) -> SCANVI:
    """Of 97 cells, without dropout, in float64; the noise is for the caller to fix."""
    model = small_model(simulated(97), dropout_rate=0.0)
    return model.train(4, batch_size=batch_size, **EXACT, **more)


def noisy(epochs: int, folder: Path | None = None, seed: int = 0, **more) -> SCANVI:
    model = small_model(simulated(97), seed=2, dropout_rate=0.3)
    arguments = EVERYTHING | QUIET | more
    return model.train(epochs, batch_size=16, checkpoint_dir=folder, seed=seed, **arguments)


def error_of(kind: type[Exception], call: Callable, *arguments, **more) -> str:
    try:
        call(*arguments, **more)
    except kind as error:
        return str(error)
    return "none"


class Infinite(SCANVAE):
    """One cell whose likelihood is 0."""

    bad = -1

    def observed(self, z, library, y, cells):
        odd = torch.where(cells.position == self.bad, torch.inf, 0.0).unsqueeze(-1)
        seen = {"odd": (Normal(torch.zeros_like(odd), 1.0).to_event(1), odd)}
        return super().observed(z, library, y, cells) | seen


def not_finite() -> dict:
    """A cell that is in the minibatch of one process alone."""
    adata = simulated(97)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    model = SCANVI(adata, module_class=Infinite, n_hidden=8, n_latent=3)
    before = digest(model)
    model.module.bad = 13
    error = error_of(NonFiniteError, model.train, 2, batch_size=16, train_size=1.0, **QUIET)
    return {"error": error, "moved": digest(model) != before, "digest": digest(model)}


def runs(folder: Path) -> dict:
    """What one script may do, in turn; results of this process."""
    rank = int(os.environ["RANK"])
    found: dict = {"whole": told(noisy(4, folder / "whole"))}
    found["files"] = sorted(str(p.relative_to(folder)) for p in (folder / "whole").rglob("*"))
    noisy(2, folder / "stopped")
    found["resumed"] = told(noisy(4, folder / "stopped", ckpt_path="last"))
    stopping = {"early_stopping": True, "early_stopping_patience": 1, "pretrain_epochs": 0}
    found["early"] = told(noisy(50, **stopping | {"plan_kwargs": {"lr": 1e-6}}))
    found["disagree"] = error_of(InputError, noisy, 1, seed=rank)
    found["not finite"] = not_finite()
    model = noisy(1)
    model.save(folder / f"saved by {rank}")
    standard = torch.distributions.normal._standard_normal
    torch.distributions.normal._standard_normal = even_noise
    found["exact"] = told(exact_run(16, strategy="ddp", devices=2))
    torch.distributions.normal._standard_normal = standard
    return found


def few_epochs() -> dict:
    return told(noisy(1))


def ended_in(folder: Path, how: Callable[[], None], rank: int) -> None:
    """Something ends one process in the third epoch."""

    def end(trainer, *_):
        if trainer.current_epoch == 2 and trainer.global_rank == rank:
            how()

    callback = LambdaCallback(on_train_batch_start=end)
    noisy(50, folder, callbacks=[callback], pretrain_epochs=0)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def mistaken() -> None:
    raise RuntimeError("a mistake of one process")

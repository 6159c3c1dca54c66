"""Is inference calibrated? Simulation-based calibration of default models, right and broken.

``python benchmarks/calibration.py --seeds 5 --json calibration.json`` prints a table: a row for
each subject, over seeds. For each seed a default model A is trained on the demo (700 cells, 765
genes, ten labels of each type), cells are simulated from it, and a default model B is trained on
those. `fails` is the number of seeds in which any quantity fails at a false alarm of 1 %.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from pyro.distributions import Normal

from pyro_scanvi import ELBO, SCANVAE, SCANVI, datasets
from pyro_scanvi.criticism import Calibration, FromChain, FromWeights, simulation_based_calibration
from pyro_scanvi.criticism.story import tell
from pyro_scanvi.data.minibatches import total_counts

FALSE_ALARM = 0.01
SMALL = {"n_input": 6, "n_labels": 3, "n_latent": 2, "n_hidden": 4, "gene_likelihood": "nb"}


def trained(adata: ad.AnnData, seed: int, epochs: int) -> SCANVI:
    """A default model, with ten labels of each type."""
    adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], n_per_label=10, seed=seed)
    SCANVI.setup_anndata(adata, labels_key="given", unlabeled_category="Unknown")
    return SCANVI(adata, seed=seed).train(max_epochs=epochs, objective=ELBO(), progress_bar=False)


def simulated(model: SCANVI, library: torch.Tensor) -> ad.AnnData:
    """Cells of the story that a model tells, with the types that they have in it."""
    with torch.no_grad():
        states, _, seen = tell(model.module, model.module.unseen(len(library), library=library))
    names = np.array([*map(str, model.fields.classes)])[states["y"].argmax(-1).numpy()]
    obs = pd.DataFrame({"cell_type": pd.Categorical(names)}, index=[*map(str, range(len(names)))])
    return ad.AnnData(seen["x"].numpy(), obs, pd.DataFrame(index=[*model.fields.genes]))


def with_theta(vae: SCANVAE, factor: float) -> SCANVAE:
    """The same model, its inverse dispersions multiplied."""
    changed = copy.deepcopy(vae)
    with torch.no_grad():
        changed.dispersion.log_theta.add_(np.log(factor))
    return changed


def with_prior(vae: SCANVAE) -> SCANVAE:
    """The same model, whose first type is as frequent as all others together."""
    changed = copy.deepcopy(vae)
    others = (changed.n_labels - 1) * [0.5 / (changed.n_labels - 1)]
    changed.y_prior.copy_(torch.tensor([0.5, *others]))
    return changed


def halved(vae: SCANVAE) -> SCANVAE:
    """The same model, whose guide of z has half the scale."""
    changed = copy.deepcopy(vae)
    q_z = changed.q_z

    def narrow(cells):
        q = q_z(cells).base_dist
        return Normal(q.loc, q.scale / 2).to_event(1)

    changed.q_z = narrow
    return changed


def of_default(seed: int, settings: argparse.Namespace) -> Iterator[tuple[str, Calibration]]:
    """Calibrations of models trained on the demo, and on cells simulated from those."""
    demo = datasets.pbmc68k_counts()
    library = torch.as_tensor(total_counts(demo.X)[0], dtype=torch.float32).unsqueeze(-1)
    a = trained(demo, seed, settings.epochs)
    torch.manual_seed(seed)
    b = trained(simulated(a, library), seed, settings.epochs)
    at = torch.randint(len(library), (settings.simulations,))
    run = {"library": library[at], "seed": seed, "n_simulations": settings.simulations}
    run["progress_bar"] = False
    yield "default on the demo: guide", simulation_based_calibration(a, **run)
    yield "default on its own simulation: guide", simulation_based_calibration(b, **run)
    narrow = simulation_based_calibration(halved(b.module), **run)
    yield "the same, scale of q(z | x) halved: guide", narrow
    pool = FromWeights(settings.proposals)
    weighed = simulation_based_calibration(b, posterior=pool, **run)
    yield "default on its own simulation: weights", weighed
    if seed < settings.chain_seeds:
        yield from of_chain(b, run | {"library": library[at][: settings.chain_simulations]})


def of_chain(model: SCANVI, run: dict[str, Any]) -> Iterator[tuple[str, Calibration]]:
    """The same by chains, which see what the pool of weights does not: slow, so of fewer cells."""
    run = run | {"n_simulations": len(run["library"]), "n_draws": 19}
    run["posterior"] = FromChain(n_tuning=20)
    yield "default on its own simulation: chain", simulation_based_calibration(model, **run)
    doubled = simulation_based_calibration(with_theta(model.module, 2), simulator=model, **run)
    yield "the same, theta doubled: chain", doubled


def of_small(seed: int, settings: argparse.Namespace) -> Iterator[tuple[str, Calibration]]:
    """Calibrations of a model of six genes with random weights, whose guide proposes well."""
    torch.manual_seed(seed)
    vae = SCANVAE(**SMALL).eval()
    run = {"library": 30.0, "seed": seed, "n_simulations": 2 * settings.simulations}
    run |= {"progress_bar": False, "posterior": FromWeights(100)}
    yield "six genes: weights", simulation_based_calibration(vae, **run)
    yield (
        "six genes, theta doubled: weights",
        simulation_based_calibration(with_theta(vae, 2), simulator=vae, **run),
    )
    yield (
        "six genes, label prior ignored: weights",
        simulation_based_calibration(vae, simulator=with_prior(vae), **run),
    )


def row(subject: str, seed: int, found: Calibration, seconds: float) -> dict[str, Any]:
    """What one calibration says."""
    table = found.test(FALSE_ALARM)
    spread = table.groupby("site")["spread"].mean()
    effective = np.nan if found.effective is None else float(found.effective.median())
    return {
        "subject": subject,
        "seed": seed,
        "quantities": len(table),
        "failing": int(table["fails"].sum()),
        "sites": " ".join(sorted(set(table.loc[table["fails"], "site"]))),
        **{f"spread {site}": float(spread[site]) for site in ("z", "u", "y", "data")},
        "effective": effective,
        "seconds": seconds,
    }


def rows(study, seeds: range, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each calibration of a study, timed with the training before it."""
    for seed in seeds:
        start = time.perf_counter()
        for subject, found in study(seed, settings):
            yield row(subject, seed, found, time.perf_counter() - start)
            start = time.perf_counter()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each subject: seeds, seeds that fail, and the range of numbers over seeds."""
    groups = table.groupby("subject", sort=False)
    spans = {
        c: groups[c].agg(lambda v: f"{v.mean():.2f} ({v.min():.2f} to {v.max():.2f})")
        for c in ("failing", "spread z", "spread u", "spread y", "spread data", "effective")
    }
    counts = {"seeds": groups.size(), "fails": groups["failing"].agg(lambda v: int((v > 0).sum()))}
    return pd.DataFrame({**counts, **spans, "seconds": groups["seconds"].mean().round(1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of the default models")
    parser.add_argument("--small-seeds", type=int, default=100, help="of the small ones")
    parser.add_argument("--chain-seeds", type=int, default=2, help="of those, asked by chains")
    parser.add_argument("--chain-simulations", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--proposals", type=int, default=500)
    parser.add_argument("--json", type=Path, default=Path("calibration.json"))
    settings = parser.parse_args()
    found = [*rows(of_small, range(settings.small_seeds), settings)]
    for line in rows(of_default, range(settings.seeds), settings):
        found.append(line)
        print(f"{line['subject']}, seed {line['seed']}: {line['failing']} fail", flush=True)
        settings.json.write_text(json.dumps(found, indent=1))
    settings.json.write_text(json.dumps(found, indent=1))
    print(summary(pd.DataFrame(found)).to_string())


if __name__ == "__main__":
    main()

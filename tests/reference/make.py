"""Write the files of this folder anew; needs scvi-tools 1.4.2, which nothing else here does.

    python tests/reference/make.py FOLDER          train all, write FOLDER/NAME.npz and saved models
    python tests/reference/make.py --check FILE..  compute the figures of existing files again

README.md says what a file holds.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from scvi.module import SCANVAE
from torch import Tensor
from torch.distributions import normal

N_CELLS, N_GENES, N_LABELS = 48, 40, 4
KL_WEIGHTS = (1.0, 0.3)
RATIO = 50
SMALL = {"n_hidden": 16, "n_latent": 4, "n_layers": 1, "dropout_rate": 0.1}
CONFIGURATIONS = {
    "default": {},
    "embedding": {"batch_representation": "embedding"},
    "gene_cell": {"dispersion": "gene-cell"},
    "latent_library": {"use_observed_lib_size": False},
    "latent_library_covariates": {
        "use_observed_lib_size": False,
        "encode_covariates": True,
        "n_layers": 2,
    },
    "layer_norm": {"use_batch_norm": "none", "use_layer_norm": "both"},
    "linear_classifier": {"linear_classifier": True},
    "nb_gene_batch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "poisson": {"gene_likelihood": "poisson"},
    "shallow_covariates": {
        "n_layers": 2,
        "encode_covariates": True,
        "deeply_inject_covariates": False,
    },
    "size_factor": {"use_size_factor_key": True},
    "two_layers_deep_covariates": {
        "n_layers": 2,
        "encode_covariates": True,
        "deeply_inject_covariates": True,
    },
}


def cells(seed: int = 0) -> ad.AnnData:
    """Counts of four types in three batches; a quarter of the labels is not known."""
    rng = np.random.default_rng(seed)
    label, batch = rng.integers(N_LABELS, size=N_CELLS), rng.integers(3, size=N_CELLS)
    rate = (
        rng.gamma(1.5, size=(N_LABELS, N_GENES))[label] * rng.gamma(9, 1 / 9, (3, N_GENES))[batch]
    )
    adata = ad.AnnData(rng.poisson(rate * rng.gamma(5, 0.4, (N_CELLS, 1))).astype(np.float32))
    adata.obs["batch"] = pd.Categorical.from_codes(batch, ["b0", "b1", "b2"])
    known = rng.random(N_CELLS) < 0.75
    adata.obs["label"] = np.where(known, np.char.add("t", label.astype(str)), "Unknown")
    adata.obs["age"] = rng.normal(size=N_CELLS).astype(np.float32)
    adata.obs["donor"] = pd.Categorical.from_codes(np.arange(N_CELLS) % 3, ["d0", "d1", "d2"])
    adata.obs["sex"] = pd.Categorical.from_codes(np.arange(N_CELLS) % 2, ["f", "m"])
    adata.obs["size"] = adata.X.sum(1) * rng.gamma(20, 1 / 20, N_CELLS)
    return adata


def trained(changes: dict) -> tuple[SCANVAE, dict, dict[str, Tensor], np.ndarray]:
    """Module after three epochs, its arguments, the cells, and the labels in code order."""
    adata, arguments = cells(), SMALL | changes
    with_size = arguments.get("use_size_factor_key", False)
    scvi.model.SCANVI.setup_anndata(
        adata,
        labels_key="label",
        unlabeled_category="Unknown",
        batch_key="batch",
        size_factor_key="size" if with_size else None,
        continuous_covariate_keys=["age"],
        categorical_covariate_keys=["donor", "sex"],
    )
    # The model finds out about the size factor from the data.
    own = {k: v for k, v in arguments.items() if k != "use_size_factor_key"}
    model = scvi.model.SCANVI(adata, **own)
    model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, logger=False)
    tensors = next(iter(model._make_data_loader(adata, batch_size=N_CELLS)))
    tensors = {k: v.long() if k in ("batch", "labels") else v for k, v in tensors.items()}
    sizes = {"n_input": N_GENES, "n_batch": 3, "n_labels": N_LABELS}
    sizes |= {"n_continuous_cov": 1, "n_cats_per_cov": [3, 2]}
    labels = model.adata_manager.get_state_registry("labels").categorical_mapping
    return model.module.cpu().eval(), arguments | sizes, tensors, labels


@contextmanager
def standard_normals(noise: list[Tensor]) -> Iterator[list[Tensor]]:
    """Every Normal takes its noise from `noise` while it lasts; yields all that was drawn."""
    drawn: list[Tensor] = []
    draw: Callable = normal._standard_normal

    def recorded(shape, dtype, device):
        fresh = len(drawn) >= len(noise)
        drawn.append(draw(shape, dtype, device) if fresh else noise[len(drawn)].reshape(shape))
        return drawn[-1]

    normal._standard_normal = recorded
    try:
        yield drawn
    finally:
        normal._standard_normal = draw


def run(module: SCANVAE, tensors: dict, noise: list[Tensor], **loss_arguments):
    """Inference, generation and loss; also the noise drawn, and how much of it by inference."""
    with standard_normals(noise) as drawn:
        inference = module.inference(**module._get_inference_input(tensors))
        n_inference = len(drawn)
        generation = module.generative(**module._get_generative_input(tensors, inference))
        loss = module.loss(tensors, inference, generation, **loss_arguments)
    return inference, generation, loss, drawn, n_inference


def figures(module: SCANVAE, tensors: dict, noise: list[Tensor]) -> dict[str, Tensor]:
    """All that is written about a model, a minibatch and noise (drawn where the list is empty)."""
    inference, generation, _, drawn, n_inference = run(module, tensors, noise)
    drawn = drawn[: n_inference + 1]
    found = {f"noise/{i}": values for i, values in enumerate(drawn)}
    found["noise/n_inference"] = torch.tensor(n_inference)
    for weight in KL_WEIGHTS:
        loss = run(module, tensors, drawn, kl_weight=weight)[2]
        found[f"loss/kl_{weight}"] = loss.loss
        found[f"loss/reconstruction_kl_{weight}"] = loss.reconstruction_loss["reconstruction_loss"]
        found[f"loss/kl_local_kl_{weight}"] = loss.kl_local["kl_local"]
    known = tensors["labels"].reshape(-1) < module.n_labels
    labelled = {k: v[known] for k, v in tensors.items()}
    loss = run(module, tensors, drawn, labelled_tensors=labelled, classification_ratio=RATIO)[2]
    found[f"loss/with_classification_{RATIO}"] = loss.loss
    found["loss/cross_entropy"] = loss.classification_loss
    found |= {f"q_z/{k}": getattr(inference["qz"], k) for k in ("loc", "scale")}
    found |= {"q_z/sample": inference["z"], "library": inference["library"]}
    if inference["ql"] is not None:
        found |= {f"q_l/{k}": getattr(inference["ql"], k) for k in ("loc", "scale")}
    px = generation["px"]
    for name in ("mu", "rate", "theta", "zi_logits", "scale", "mean"):
        if getattr(px, name, None) is not None:
            found[f"p_x/{name}"] = getattr(px, name)
    found["p_x/log_prob"] = px.log_prob(tensors["X"]).sum(-1)
    inputs = module._get_inference_input(tensors)
    return found | {"classify/logits": module.classify(**inputs)}


def rebuilt(file: dict[str, np.ndarray]) -> SCANVAE:
    """The module of a file."""
    arguments = json.loads(str(file["kwargs"]))
    weights = {k[7:]: torch.from_numpy(v) for k, v in file.items() if k.startswith("weight/")}
    for name in ("library_log_means", "library_log_vars"):
        if name in weights:
            arguments[name] = weights[name].numpy()
    module = SCANVAE(**arguments)
    module.load_state_dict(weights)
    return module.eval()


def check(path: Path) -> None:
    """Print the largest difference between the figures of a file and those computed again."""
    file = dict(np.load(path))
    tensors = {k[6:]: torch.from_numpy(v) for k, v in file.items() if k.startswith("input/")}
    n_noise = int(file["noise/n_inference"]) + 1
    noise = [torch.from_numpy(file[f"noise/{i}"]) for i in range(n_noise)]
    again = figures(rebuilt(file), tensors, noise)
    worst = max(
        abs(v.numpy() - file[k]).max() / max(abs(file[k]).max(), 1e-30) for k, v in again.items()
    )
    missing = {k for k in file if k.split("/")[0] in ("loss", "q_z", "q_l", "p_x")} - set(again)
    print(f"{path}: largest relative difference {worst:.1e}, not computed: {missing or 'nothing'}")


def write_saves(folder: Path) -> None:
    """An SCVI and a SCANVI as their save() leaves them, and what they say about the cells."""
    keys = {"labels_key": "label", "batch_key": "batch", "categorical_covariate_keys": ["sex"]}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    adata = cells()
    scvi.model.SCVI.setup_anndata(adata, **keys)
    unsupervised = scvi.model.SCVI(adata, **SMALL)
    unsupervised.train(max_epochs=2, **quiet)
    unsupervised.save(folder / "saved_scvi", overwrite=True)
    latent = unsupervised.get_latent_representation()
    scvi.model.SCANVI.setup_anndata(adata, unlabeled_category="Unknown", **keys)
    model = scvi.model.SCANVI(adata, **SMALL)
    model.train(max_epochs=2, **quiet)
    model.save(folder / "saved_scanvi", overwrite=True)
    soft = model.predict(soft=True)
    np.savez_compressed(
        folder / "saved_scanvi" / "expected.npz",
        X=adata.X,
        batch=adata.obs["_scvi_batch"].to_numpy(),
        sex=adata.obs["sex"].cat.codes.to_numpy(),
        scvi_latent=latent,
        classes=soft.columns.to_numpy(dtype=str),
        probabilities=soft.to_numpy(),
    )


def main(arguments: list[str]) -> None:
    """See the top of the file."""
    if arguments[0] == "--check":
        with torch.no_grad():
            for path in arguments[1:]:
                check(Path(path))
        return
    for name, changes in CONFIGURATIONS.items():
        scvi.settings.seed = 0
        module, kwargs, tensors, labels = trained(changes)
        with torch.no_grad():
            arrays = {k: v.numpy() for k, v in figures(module, tensors, []).items()}
        arrays |= {f"weight/{k}": v.numpy() for k, v in module.state_dict().items()}
        arrays |= {f"input/{k}": v.numpy() for k, v in tensors.items()}
        arrays |= {"kwargs": json.dumps(kwargs), "classes": labels.astype(str)}
        np.savez_compressed(Path(arguments[0]) / f"{name}.npz", **arrays)
    write_saves(Path(arguments[0]))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main(sys.argv[1:])

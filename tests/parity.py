"""Compare this package with figures of scvi-tools: ``python -m tests.parity FILE.npz ...``.

A file holds the weights and the arguments of a model of scvi-tools, a minibatch, the noise that was
drawn, and what scvi-tools made of them; tests/reference/make.py writes such files. For each figure
the largest absolute error is printed, and the relative one: the largest absolute error over the
largest expected absolute value. The exit status is 1 if any relative error is above 1e-4, or if a
file holds a figure that is not known here.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_scanvi.model.scanvae import SCANVAE

TOLERANCE = 1e-4
GIVEN = ("kwargs", "classes", "weight/", "input/", "noise/")


@dataclass(frozen=True)
class Reference:
    """One file: arguments, weights, minibatch and noise of scvi-tools, and its figures."""

    arguments: dict
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    noise: list[Tensor]
    figures: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | Path) -> "Reference":
        """Read an .npz file in the format of tests/reference/README.md."""
        with np.load(path) as file:
            arrays = dict(file)
        arrays["noise/n_inference"]  # says that the format is the one we know

        def under(prefix: str) -> dict[str, Tensor]:
            found = {k: v for k, v in arrays.items() if k.startswith(prefix)}
            return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in found.items()}

        noise = under("noise/")
        return cls(
            arguments=json.loads(str(arrays["kwargs"])),
            weights=under("weight/"),
            tensors=under("input/"),
            noise=[noise[str(i)] for i in range(len(noise) - 1)],
            figures={k: v for k, v in arrays.items() if not k.startswith(GIVEN)},
        )

    def model(self) -> SCANVAE:
        """Our model with these weights, in eval mode."""
        return SCANVAE.from_scvi_tools(self.weights, **self.arguments)


def figures(vae: SCANVAE, reference: Reference) -> dict[str, Tensor]:
    """Our figures, by the names of the file."""
    inputs = reference.tensors
    covariates = {
        "batch_index": inputs["batch"],
        "cont_covs": inputs.get("extra_continuous_covs"),
        "cat_covs": inputs.get("extra_categorical_covs"),
    }
    inference = vae.inference(inputs["X"], **covariates)
    inference["z"] = inference["qz"].loc + inference["qz"].scale * reference.noise[0]
    if inference["ql"] is not None:
        inference["library"] = inference["ql"].loc + inference["ql"].scale * reference.noise[1]
    found = {"q_z/sample": inference["z"], "library": inference["library"]}
    found |= _normal("q_z", inference["qz"]) | _normal("q_l", inference["ql"])
    found |= _counts(vae, reference, inference, covariates)
    found["classify/logits"] = vae.classify(inputs["X"], **covariates)
    return found | _losses(vae, reference, inference)


def _normal(name: str, normal) -> dict[str, Tensor]:
    return {} if normal is None else {f"{name}/loc": normal.loc, f"{name}/scale": normal.scale}


def _counts(vae: SCANVAE, reference: Reference, inference: dict, covariates: dict) -> dict:
    inputs = reference.tensors
    size_factor = inputs.get("size_factor")
    log_size = None if size_factor is None else size_factor.log()
    z, library = inference["z"], inference["library"]
    px = vae.generative(z, library, **covariates, size_factor=log_size, y=inputs["labels"])["px"]
    cells = vae.cells_from_tensors(inputs)
    found = {
        "p_x/mu": px.mu,
        "p_x/rate": px.mu,
        "p_x/mean": px.mean,
        "p_x/scale": vae.count_parameters(z, library.exp(), None, cells).rho,
        "p_x/log_prob": px.log_prob(inputs["X"]).sum(-1),
    }
    if hasattr(px, "theta"):
        found["p_x/theta"] = px.theta.expand_as(px.mu)
    return found | ({"p_x/zi_logits": px.gate_logits} if hasattr(px, "gate_logits") else {})


def _losses(vae: SCANVAE, reference: Reference, inference: dict) -> dict[str, Tensor]:
    """The objective, with the noise of the file in u too."""
    found = {}
    inputs = reference.tensors
    for name in reference.figures:
        if not name.startswith("loss/kl_") or name.startswith("loss/kl_local"):
            continue
        weight = name.removeprefix("loss/kl_")
        with poutine.replay(trace=_u(vae, reference, inference["z"])):
            record = vae.loss(inputs, inference, kl_weight=float(weight))
        found[name] = record.loss
        found[f"loss/reconstruction_kl_{weight}"] = record.reconstruction_loss
        found[f"loss/kl_local_kl_{weight}"] = record.kl_local
    with poutine.replay(trace=_u(vae, reference, inference["z"])):
        record = vae.loss(inputs, inference, labelled_tensors=inputs, classification_ratio=50.0)
    found["loss/cross_entropy"] = record.classification_loss
    found["loss/with_classification_50"] = record.loss
    return found


def _u(vae: SCANVAE, reference: Reference, z: Tensor) -> Trace:
    """A trace that holds u for every label, (L, N, K)."""
    labels = torch.eye(vae.n_labels).unsqueeze(1).expand(-1, len(z), -1)  # L, N, L
    q_u = vae.q_u(z, labels, vae.cells_from_tensors(reference.tensors))
    noise = reference.noise[-1].reshape(vae.n_labels, *z.shape)
    value = q_u.mean + q_u.stddev * noise
    trace = Trace()
    trace.add_node("u", name="u", type="sample", value=value, is_observed=False, infer={})
    return trace


def errors(path: str | Path) -> Iterator[tuple[str, float, float]]:
    """Name, absolute error and relative error of each figure in a file."""
    reference = Reference.read(path)
    with torch.no_grad():
        found = figures(reference.model(), reference)
    for name, expected in reference.figures.items():
        if name not in found:
            yield name, float("nan"), float("inf")
            continue
        ours = found[name].double().numpy()
        # Shapes must agree; numpy would broadcast them.
        absolute = abs(ours - expected).max() if ours.shape == expected.shape else np.inf
        relative = absolute / abs(expected).max() if absolute > 0 else 0.0
        yield name, float(absolute), float(relative)


def main(paths: Iterable[str]) -> int:
    """Print a table for each file; the exit status."""
    failed = False
    for path in paths:
        print(f"{path}\n{'':32}{'absolute':>12}{'relative':>12}")
        for name, absolute, relative in errors(path):
            bad = not relative <= TOLERANCE
            failed |= bad
            print(f"{name:32}{absolute:12.2e}{relative:12.2e}{'  FAILED' if bad else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else __doc__)

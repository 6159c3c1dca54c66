"""Scores of an epoch, summed up minibatch by minibatch."""

from collections import defaultdict

import torch

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.model.objective import ObjectiveParts


class EpochScores:
    """Sums over the minibatches of an epoch, and the scores of its labelled cells."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.n_cells = 0
        self.labels: list[torch.Tensor] = []
        self.probabilities: list[torch.Tensor] = []

    def add(self, parts: ObjectiveParts, cells: Cells) -> None:
        """Take in a minibatch."""
        self.n_cells += len(cells)
        self.sums["elbo"] += parts.elbo().expand(len(cells)).sum().item()
        if parts.reconstructions:
            self.sums["reconstruction"] += parts.reconstruction.sum().item()
        if len(parts.reconstructions) > 1:
            for site, cost in parts.reconstructions.items():
                self.sums[f"reconstruction_{site}"] += cost.sum().item()
        for cost in parts.kl_shared.values():
            self.sums["kl_shared"] += cost.item() / parts.n_obs * len(cells)
        for site, kl in parts.kl.items():
            self.sums[f"kl_{site}"] += kl.sum().item()
        if parts.logits is None or parts.classification is None:
            return
        self.sums["cross_entropy"] += parts.classification.sum().item()
        labelled = cells.labelled
        self.labels.append(cells.label[labelled].cpu())
        self.probabilities.append(parts.logits.detach()[labelled].softmax(-1).cpu())

    def mean(self) -> dict[str, float]:
        """Per cell: ELBO, reconstruction and KLs. Per labelled cell: the rest."""
        n_cells = max(self.n_cells, 1)
        means = {name: total / n_cells for name, total in self.sums.items()}
        if not self.labels:  # nothing was classified
            return means
        label = torch.cat(self.labels).numpy()
        if not len(label):
            return means | {"cross_entropy": float("nan")}
        means["cross_entropy"] *= n_cells / len(label)
        return means | label_scores(label, torch.cat(self.probabilities).numpy())

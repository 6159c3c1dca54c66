"""Scores of an epoch, summed up minibatch by minibatch."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.model.objective import ObjectiveParts

EVIDENCE = "label"  # the site of what is known of the label, told where it costs anything
OF_SITE = "reconstruction_"


class EpochScores:
    """Sums over the minibatches of an epoch, and the scores of its labelled cells."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.n_cells = self.n_informative = 0
        self.labels: list[torch.Tensor] = []
        self.probabilities: list[torch.Tensor] = []

    def add(self, parts: ObjectiveParts, cells: Cells) -> None:
        """Take in a minibatch."""
        self.n_cells += len(cells)
        self.sums["elbo"] += parts.elbo().expand(len(cells)).sum().item()
        if parts.reconstructions:
            self.sums["reconstruction"] += parts.reconstruction.sum().item()
        for site, cost in parts.reconstructions.items():
            self.sums[f"{OF_SITE}{site}"] += cost.sum().item()
        for cost in parts.kl_shared.values():
            self.sums["kl_shared"] += cost.item() / parts.n_obs * len(cells)
        for site, kl in parts.kl.items():
            self.sums[f"kl_{site}"] += kl.sum().item()
        if parts.logits is None or parts.classification is None:
            return
        self.sums["cross_entropy"] += parts.classification.sum().item()
        labelled = cells.labelled
        informative = labelled if parts.informative is None else parts.informative
        self.n_informative += int(informative.sum())
        self.labels.append(cells.label[labelled].cpu())
        self.probabilities.append(parts.logits.detach()[labelled].softmax(-1).cpu())

    @classmethod
    def of_all(cls, parts: Iterable["EpochScores"]) -> "EpochScores":
        """Those of several processes as one."""
        scores = cls()
        for part in parts:
            scores.n_cells += part.n_cells
            scores.n_informative += part.n_informative
            scores.labels += part.labels
            scores.probabilities += part.probabilities
            for name, total in part.sums.items():
                scores.sums[name] += total
        return scores

    def mean(self) -> dict[str, float]:
        """Per cell: ELBO, reconstruction and KLs. Per labelled cell: the rest.

        Cross-entropy is that of all cells of whose label anything is known; the other scores are
        of those whose label is exact.
        """
        n_cells = max(self.n_cells, 1)
        means = {name: total / n_cells for name, total in self._told().items()}
        if not self.labels:  # nothing was classified
            return means
        means["cross_entropy"] = self.sums["cross_entropy"] / (self.n_informative or math.nan)
        label = torch.cat(self.labels).numpy()
        if not len(label):
            return means
        return means | label_scores(label, torch.cat(self.probabilities).numpy())

    def _told(self) -> dict[str, float]:
        """The sums; of each observed site its own where there are several that cost anything."""
        by_site = {name for name in self.sums if name.startswith(OF_SITE)}
        told = {name for name in by_site if name != OF_SITE + EVIDENCE or self.sums[name]}
        left_out = by_site - told if len(told) > 1 else by_site
        return {name: total for name, total in self.sums.items() if name not in left_out}

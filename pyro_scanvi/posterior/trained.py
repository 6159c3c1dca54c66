"""What the questions read of a model, whatever their theme."""

from collections.abc import Sequence

import anndata as ad
import pandas as pd

from pyro_scanvi.annotation.consensus import Consensus
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.model.scanvae import SCANVAE


class Trained:
    """A SCANVI as its questions see it; each theme is a subclass, which SCANVI inherits.

    Attributes
    ----------
    module
        The networks, which know tensors only.
    fields
        Names of genes, labels and batches.
    adata
        The training data.
    """

    module: SCANVAE
    fields: Fields
    adata: ad.AnnData

    def encoded(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | None,
        labels: bool = True,
        covariates: bool = True,
        extra: bool = True,
    ) -> tuple[CellData, pd.Index]:
        """What a question reads of some cells, and their names; None is the training data, all.

        `labels`, `covariates` (with batch and size factors) and `extra` say whether it reads those.
        Extra data are read by what replays the model, of which they are observed; the guide and the
        decoder of counts do not need them, unless factors of one's own read them.
        """
        raise NotImplementedError

    @property
    def label_method(self) -> str:
        """How labels are found unless it is said."""
        raise NotImplementedError

    def consensus(self) -> Consensus:
        """The label rules; InputError where there are none and none can be learned."""
        raise NotImplementedError

"""Do labelled cells drift onto islands of their own while a model is trained?"""

# mypy: disable-error-code="override"
# Lightning's hooks take any module; this callback is given to Trainers of SCANVI alone.

from collections.abc import Sequence
from typing import cast

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from pyro_scanvi.data.minibatches import UNLABELED, CellData
from pyro_scanvi.metrics import within_type_leak
from pyro_scanvi.posterior.draws import minibatch_size
from pyro_scanvi.posterior.labels import latent_points
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.validation import InputError, check_at_least


class LeakHistory(Callback):
    """Notes how far a latent space tells which cells were labelled, as column "leak" of history.

    It is the mean over types of :func:`pyro_scanvi.metrics.within_type_leak` of the training
    cells, at the end of each n-th epoch; the other epochs have NaN. Nothing else changes.

    Parameters
    ----------
    types
        True type of each cell of the model's AnnData, in its order, (N,): labels that are hidden
        from the model too.
    every_n_epochs
        A pass over all training cells each.

    Raises
    ------
    InputError
        In training, where there are fewer types than cells; or if `every_n_epochs` is below 1.

    Examples
    --------
    >>> from pyro_scanvi import ELBO, SCANVI, datasets
    >>> adata = datasets.pbmc68k_counts()
    >>> adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], 10, seed=0)
    >>> SCANVI.setup_anndata(adata, "given", "Unknown")
    >>> watch = LeakHistory(adata.obs["cell_type"], every_n_epochs=2)
    >>> model = SCANVI(adata)
    >>> model = model.train(2, objective=ELBO(), callbacks=[watch], progress_bar=False)
    >>> model.history.loc[model.history["leak"].notna(), "epoch"].tolist()
    [1]
    """

    def __init__(self, types: Sequence[str], every_n_epochs: int = 10):
        check_at_least(1, every_n_epochs=every_n_epochs)
        self.types, self.every_n_epochs = np.asarray(types).astype(str), every_n_epochs

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: LightningObjective) -> None:
        """Look, if it is time."""
        if (module.epoch + 1) % self.every_n_epochs:
            return
        data = cast(CellData, cast(DataLoader, trainer.train_dataloader).dataset)
        cells = cast(np.ndarray, data.position)  # in the AnnData
        if cells.max() >= len(self.types):
            raise InputError(
                f"there are {len(self.types)} types and more cells than that; give one for each "
                "cell of the AnnData"
            )
        latent = latent_points(module.vae, data, minibatch_size(None))
        leak = within_type_leak(latent, self.types[cells], data.label != UNLABELED)
        module.noted["leak"] = float(leak.mean())

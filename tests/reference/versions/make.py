"""Write a folder of this one anew; needs the version of scvi-tools that it is to be of.

    python tests/reference/versions/make.py FOLDER    writes FOLDER/VERSION

An SCVI is trained for two epochs, the SCANVI made from it for two more; it is saved and asked.
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi

N_CELLS, N_GENES = 48, 12
SIZES = {"n_hidden": 4, "n_latent": 3, "encode_covariates": True}


def cells() -> ad.AnnData:
    """Counts of three types in two batches; a quarter of the labels is not known.

    "Unknown" stands between the others in the order of the alphabet; scvi-tools puts it last.
    """
    rng = np.random.default_rng(0)
    label, batch = rng.integers(3, size=N_CELLS), rng.integers(2, size=N_CELLS)
    rate = rng.gamma(1.5, size=(3, N_GENES))[label] * rng.gamma(5, 0.4, (N_CELLS, 1))
    known = rng.random(N_CELLS) < 0.75
    columns = {
        "label": np.where(known, np.array(["zeta", "B", "T"])[label], "Unknown"),
        "batch": np.array(["b1", "b0"])[batch],
        "sex": np.array(["f", "m"])[np.arange(N_CELLS) % 2],
        "age": rng.normal(size=N_CELLS),
    }
    names = [f"cell {i}" for i in range(N_CELLS)]
    genes = pd.DataFrame(index=[f"gene {i}" for i in range(N_GENES)])
    return ad.AnnData(rng.poisson(rate).astype(np.float32), pd.DataFrame(columns, names), genes)


def main(folder: Path) -> None:
    """See the top of the file."""
    scvi.settings.seed = 0
    adata = cells()
    columns = {name: adata.obs[name].to_numpy() for name in adata.obs}
    scvi.model.SCVI.setup_anndata(
        adata,
        labels_key="label",
        batch_key="batch",
        categorical_covariate_keys=["sex"],
        continuous_covariate_keys=["age"],
    )
    unsupervised = scvi.model.SCVI(adata, **SIZES)
    unsupervised.train(max_epochs=2, batch_size=16)
    model = scvi.model.SCANVI.from_scvi_model(unsupervised, unlabeled_category="Unknown")
    model.train(max_epochs=2, batch_size=16)
    place = folder / scvi.__version__
    model.save(str(place), overwrite=True)
    soft = model.predict(soft=True)
    np.savez_compressed(
        place / "expected.npz",
        X=adata.X,
        genes=np.array(adata.var_names, dtype=str),
        classes=np.array(soft.columns, dtype=str),
        probabilities=soft.to_numpy(),
        latent=model.get_latent_representation(),
        **{name: v if name == "age" else v.astype(str) for name, v in columns.items()},
    )


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

"""What scvi-tools saved opens here, and its arguments mean what they mean there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.scvi_tools.arguments import scanvae_arguments
from pyro_scanvi.scvi_tools.saves import ScviSave, read_save
from pyro_scanvi.scvi_tools.weights import shared_state
from tests import parity

FOLDER = Path(__file__).parent.parent / "reference"


def test_arguments_of_scvi_tools():
    given = {
        "non_kwargs": {"n_layers": 0, "datamodule": None, "dropout_rate": np.float32(0.5)},
        "kwargs": {
            "model_kwargs": {
                "use_size_factor_key": "size",
                "use_observed_lib_size": False,
                "library_log_means": np.zeros((1, 2)),
                "extra_encoder_kwargs": {"activation_fn": torch.nn.SiLU, "bias": False},
                "batch_embedding_kwargs": {"embedding_dim": 3},
                "classifier_parameters": {"logits": False},
                "labels_groups": [0, 1],
                "n_cats_per_cov": np.array([2, 3]),
            }
        },
    }
    assert scanvae_arguments(given) == {
        "n_layers": 1,
        "linear_classifier": True,
        "dropout_rate": 0.5,
        "use_size_factor_key": True,
        "use_observed_lib_size": True,
        "extra_encoder_kwargs": {"activation": torch.nn.SiLU, "bias": False},
        "n_cats_per_cov": [2, 3],
    }


@pytest.fixture
def expected():
    return dict(np.load(FOLDER / "saved_scanvi" / "expected.npz"))


def test_saved_scanvi(expected):
    save = read_save(FOLDER / "saved_scanvi")
    assert (save.model_name, save.version) == ("SCANVI", "1.4.2")
    assert save.labels == ["t3", "t0", "t1", "t2", "Unknown"]
    assert save.classes == expected["classes"].tolist() == ["t3", "t0", "t1", "t2"]
    assert save.batches == ["b0", "b1", "b2"]
    assert save.covariate_categories == {"sex": ["f", "m"]}
    assert save.continuous_covariates == []
    assert save.var_names.tolist() == [str(i) for i in range(40)]
    assert save.setup_args["labels_key"] == "label"
    assert not save.ends_in_softmax
    vae = SCANVAE.from_scvi_tools(save.state_dict, **save.arguments())
    batch, sex = torch.from_numpy(expected["batch"]), torch.from_numpy(expected["sex"])
    logits = vae.classify(torch.from_numpy(expected["X"]), batch, cat_covs=sex[:, None])
    np.testing.assert_allclose(
        logits.softmax(-1).detach().numpy(), expected["probabilities"], atol=parity.TOLERANCE
    )


def test_saved_scvi_is_a_warm_start(expected):
    save = read_save(FOLDER / "saved_scvi")
    assert save.model_name == "SCVI" and save.unlabeled_category is None
    vae = SCANVAE(**save.arguments() | {"n_labels": 4}).eval()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    shared = shared_state(vae.state_dict(), save.state_dict)
    left = vae.load_state_dict(shared, strict=False).missing_keys
    assert {k.split(".")[0] for k in left} == {"y_prior", "classifier", "u_encoder", "z_decoder"}
    assert all(torch.equal(before[k], vae.state_dict()[k]) for k in left)
    latent = vae.inference(torch.from_numpy(expected["X"]))["qz"].loc.detach().numpy()
    np.testing.assert_allclose(latent, expected["scvi_latent"], atol=parity.TOLERANCE)
    with pytest.raises(InputError, match="misshapen"):
        smaller = SCANVAE(**save.arguments() | {"n_input": 39})
        shared_state(smaller.state_dict(), save.state_dict)


def test_only_versions_before_1_1_end_in_a_softmax():
    save = read_save(FOLDER / "saved_scanvi").__dict__
    for version, logits, ends in (("1.0.4", None, True), ("0.20.3", True, False), ("1.1.0", 0, 0)):
        parameters = {} if logits is None else {"classifier_parameters": {"logits": logits}}
        changed = save | {"version": version, "init_params": save["init_params"] | parameters}
        assert ScviSave(**changed).ends_in_softmax == ends


def test_files_that_are_no_saved_model(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_save(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a file that torch.save wrote"):
        read_save(tmp_path)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="KeyError\\('attr_dict'\\)"):
        read_save(tmp_path)

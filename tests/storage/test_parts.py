"""Parts of one's own in a saved model: named in its folder, handed in when it is opened."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pyro.distributions import OneHotCategorical, Poisson
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.model.distributions import NegativeBinomial
from pyro_scanvi.model.growth import ByBatch, ByLabel, grows
from pyro_scanvi.model.likelihoods import GENE_LIKELIHOODS, GeneLikelihood
from pyro_scanvi.storage import parts
from tests.examples import simulated, small_model


def negative_binomial(p):
    return NegativeBinomial(p.mu, p.theta)


class BatchDispersion(nn.Module):
    """One inverse dispersion for each batch."""

    reads_label = False

    def __init__(self, sizes):
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(sizes.n_batch, 1))
        grows(self, log_theta=ByBatch(dim=0))

    def forward(self, hidden, y, batch):
        return self.log_theta[batch]


PARTS = {
    "gene_likelihood": GeneLikelihood(negative_binomial, uses_gate=False),
    "dispersion": BatchDispersion,
    "var_activation": lambda x: nn.functional.softplus(x),
    "extra_encoder_kwargs.activation": nn.GELU,
}
ARGUMENTS = {name: part for name, part in PARTS.items() if "." not in name}
ARGUMENTS["extra_encoder_kwargs"] = {"activation": nn.GELU, "bias": False}


@pytest.fixture(scope="module")
def model():
    return small_model(simulated(60), **ARGUMENTS).train(2, progress_bar=False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return path


def test_it_opens_equal_to_the_bit(model, folder):
    again = SCANVI.load(folder, simulated(60), parts=PARTS)
    np.testing.assert_array_equal(again.predict(soft=True), model.predict(soft=True))
    assert again.get_elbo(seed=1) == model.get_elbo(seed=1)
    assert again.vae_arguments == model.vae_arguments
    assert isinstance(again.module.z_encoder.hidden.layers[0].activation, nn.GELU)
    assert again.module.z_encoder.hidden.layers[0].linear.bias is None


def test_the_folder_holds_names_alone(folder):
    record = json.loads((folder / "model.json").read_text())
    assert {place: name["name"] for place, name in record["parts"].items()} == {
        "gene_likelihood": "GeneLikelihood(negative_binomial)",
        "dispersion": "BatchDispersion",
        "var_activation": "<lambda>",
        "extra_encoder_kwargs.activation": "GELU",
    }
    assert record["parts"]["extra_encoder_kwargs.activation"]["module"].startswith("torch.nn")
    assert record["arguments"]["extra_encoder_kwargs"] == {"activation": None, "bias": False}
    assert record["format"] == 2, "an earlier version says that it is too old"


def test_a_model_without_parts_is_written_as_before(tmp_path):
    small_model(simulated(30), extra_encoder_kwargs={"bias": False}).save(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["format"] == 1 and "parts" not in record


REFUSED = {
    "all missing": (None, r"missing are gene_likelihood \(GeneLikelihood\(negative_binomial\) of"),
    "one missing": ({"dispersion": ...}, r"missing are dispersion \(BatchDispersion of tests\."),
    "another": ({"dispersion": nn.Linear}, r"'dispersion'\] is Linear of torch\.nn.*BatchDispersi"),
    "unknown": ({"dispresion": nn.Linear}, r"'dispresion' is not a part.*did you mean 'dispersion"),
    "no dict": ([nn.Linear], "expected a dict"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("opens", ["load", "query"])
def test_wrong_parts_are_refused_by_name(folder, case, opens):
    change, message = REFUSED[case]
    given = PARTS | change if isinstance(change, dict) else change
    given = {k: v for k, v in given.items() if v is not ...} if isinstance(given, dict) else given
    with pytest.raises(InputError, match=message):
        if opens == "load":
            SCANVI.load(folder, simulated(60), parts=given)
        else:
            SCANVI.load_query_data(simulated(60), folder, parts=given)


def test_parts_of_a_model_without_any_are_refused(tmp_path):
    small_model(simulated(30)).save(tmp_path / "model")
    with pytest.raises(InputError, match="names dispersion, but .* saved without any"):
        SCANVI.load(tmp_path / "model", simulated(30), parts={"dispersion": BatchDispersion})


def test_a_query_of_the_folder(model, folder):
    """Its answers are those of the reference, and the freeze is proved against the folder."""
    adata = simulated(60)
    query = SCANVI.load_query_data(adata, folder, parts=PARTS)
    np.testing.assert_array_equal(query.predict(soft=True), model.predict(soft=True))
    assert query.state_diff(folder)["changed"].sum() == 0
    assert query.vae_arguments["dispersion"] is BatchDispersion
    assert list(SCANVI.prepare_query_anndata(adata, folder).var_names) == list(adata.var_names)


class LearnedFrequencies(SCANVAE):
    """p(y) has parameters, which grow with the labels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frequencies = nn.Parameter(torch.arange(float(self.n_labels)))
        grows(self, frequencies=ByLabel(dim=0))

    def p_y(self, cells):
        return OneHotCategorical(logits=self.frequencies)


def test_class_and_parts_of_a_folder_grow(tmp_path):
    """A new label and a new batch, by hand: the mean of the old; old entries stay in training."""
    adata = simulated(60)
    adata.obs["batch"] = np.array(["one", "two"])[np.arange(60) % 2]
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    small = {"n_hidden": 4, "n_latent": 2, "dispersion": BatchDispersion}
    model = SCANVI(adata, module_class=LearnedFrequencies, **small)
    model.train(1, progress_bar=False).save(tmp_path / "model")
    new = adata.copy()
    new.obs["batch"] = "three"
    new.obs["cell_type"] = new.obs["cell_type"].astype(str).replace("B", "new")
    query = SCANVI.load_query_data(
        new,
        tmp_path / "model",
        extend_labels=["new"],
        module_class=LearnedFrequencies,
        parts={"dispersion": BatchDispersion},
    )
    was = model.module.frequencies.detach().clone(), model.module.dispersion.log_theta.detach()

    def assert_old_entries_and_means(frequencies, log_theta):
        assert torch.equal(frequencies[:3], was[0]) and torch.equal(log_theta[:2], was[1])

    now = query.module.frequencies.detach(), query.module.dispersion.log_theta.detach()
    assert_old_entries_and_means(*now)
    torch.testing.assert_close(now[0][3], was[0].mean())
    torch.testing.assert_close(now[1][2], was[1].mean(0))
    query.train(1, progress_bar=False)
    assert_old_entries_and_means(query.module.frequencies, query.module.dispersion.log_theta)
    query.save(tmp_path / "query")
    again = SCANVI.load(
        tmp_path / "query", new, LearnedFrequencies, {"dispersion": BatchDispersion}
    )
    assert again.state_diff(tmp_path / "model").equals(query.state_diff(model))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (negative_binomial, "negative_binomial"),
        (partial(negative_binomial, p=1), "negative_binomial(p=1)"),
        (GENE_LIKELIHOODS["nb"], "GeneLikelihood(_nb, _nb_parameters, _gamma)"),
        (nn.ReLU, "ReLU"),
        (nn.ReLU(), "ReLU()"),
        (torch.exp, "exp"),
        (Poisson(1.0).log_prob, "Poisson.log_prob"),
    ],
)
def test_names(part, name):
    found = parts.names_of_parts({"it": [1, part]})
    assert list(found) == ["it.1"] and found["it.1"]["name"].endswith(name)


def test_a_moved_function_is_the_same_part():
    """The module is said, the name alone is checked."""
    saved = parts.names_of_parts({"it": negative_binomial})
    saved["it"]["module"] = "__main__"
    parts.check_parts(saved, {"it": negative_binomial})
    with pytest.raises(InputError, match="saved with negative_binomial of __main__"):
        parts.check_parts(saved, {"it": replace})


def test_annotations_name_parts(model):
    """By name, as an address would change with every process."""
    told = model.annotate(model.adata.copy()).uns["pyro_scanvi"]["settings"]["model"]
    assert told["dispersion"] == "BatchDispersion" and told["var_activation"] == "<lambda>"
    assert told["extra_encoder_kwargs"] == "{'activation': 'GELU', 'bias': False}"
    assert "0x" not in str(told)

"""The interface of scvi-tools: its figures, its weights, its saved models, its mistakes refused."""

from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError
from tests import parity

FOLDER = Path(__file__).parent.parent / "reference"
FILES = sorted(FOLDER.glob("*.npz"))
# Heads that scvi-tools owns and does not use, with the files in which it does use them.
UNUSED = {
    "decoder.px_r_decoder.": {"gene_cell"},
    "l_encoder.": {"latent_library", "latent_library_covariates"},
    "decoder.px_dropout_decoder.": {f.stem for f in FILES} - {"nb_gene_batch", "poisson"},
    "px_r": {f.stem for f in FILES} - {"poisson"},
}
SIZES = {"n_input": 12, "n_labels": 3, "n_hidden": 8, "n_latent": 4}


@pytest.fixture(params=FILES, ids=lambda f: f.stem)
def reference(request):
    return parity.Reference.read(request.param)


@pytest.fixture
def default():
    return parity.Reference.read(FOLDER / "default.npz")


# ---- figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_figures_of_scvi_tools(path):
    found = {name: relative for name, _, relative in parity.errors(path)}
    assert {"q_z/loc", "library", "p_x/log_prob", "classify/logits", "loss/kl_1.0"} <= set(found)
    assert max(found.values()) <= 1e-4, found


def test_exit_status(tmp_path, capsys):
    arrays = dict(np.load(FOLDER / "default.npz"))
    assert parity.main([FOLDER / "default.npz"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    for name, changed in (
        ("classify/logits", arrays["classify/logits"] * np.float32(1.001)),
        ("library", arrays["library"][:, 0]),  # numpy would broadcast it
        ("loss/something_else", np.zeros(1)),
    ):
        np.savez(tmp_path / "changed.npz", **arrays | {name: changed})
        assert parity.main([tmp_path / "changed.npz"]) == 1
        table = capsys.readouterr().out.splitlines()
        assert [row.split()[0] for row in table if "FAILED" in row] == [name]


# ---- weights --------------------------------------------------------------------------------


def test_weights_there_and_back(reference, request):
    name = request.node.callspec.id
    unused = tuple(prefix for prefix, files in UNUSED.items() if name not in files)
    returned = reference.model().to_scvi_tools()
    assert returned.keys() == reference.weights.keys()
    for key, expected in reference.weights.items():
        assert returned[key].shape == expected.shape
        if key.startswith(unused):
            assert returned[key].unique().tolist() in ([0], [1]), key
        else:
            assert torch.equal(returned[key], expected), key


def test_returned_weights_are_copies(default):
    vae = default.model()
    vae.to_scvi_tools()["px_r"].zero_()
    assert torch.equal(vae.to_scvi_tools()["px_r"], default.weights["px_r"])


def test_weights_that_do_not_fit_are_counted_and_listed(default):
    weights = dict(default.weights)
    del weights["y_prior"], weights["z_encoder.mean_encoder.bias"]
    weights["px_s"] = torch.zeros(1)
    weights["px_r"] = torch.zeros(3)
    expected = (
        r"2 missing: y_prior, z_encoder.mean_encoder.bias; 1 unexpected: px_s; "
        r"1 misshapen: px_r \(3,\) for \(40,\)"
    )
    with pytest.raises(InputError, match=expected):
        SCANVAE.from_scvi_tools(weights, **default.arguments)
    # A second layer, of 7 tensors, in three encoders or decoders of z and u, x, and the classifier.
    with pytest.raises(InputError, match="35 missing: .*px_decoder.fc_layers.Layer 1.1.bias"):
        SCANVAE.from_scvi_tools(default.weights, **default.arguments | {"n_layers": 2})
    with pytest.raises(InputError, match="misshapen: y_prior .4,. for .5,."):
        SCANVAE.from_scvi_tools(default.weights, **default.arguments | {"n_labels": 5})


def test_unknown_argument(default):
    with pytest.raises(TypeError, match="n_layer.*n_layers"):
        SCANVAE.from_scvi_tools(default.weights, **default.arguments, n_layer=1)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"dispersion": "gene-label"}, "belongs to a label"),
        ({"n_layers": 0}, "at least one hidden layer"),
        ({"dispersion": lambda sizes: torch.nn.Linear(2, 2)}, "no place for dispersion.weight"),
    ],
)
def test_models_that_scvi_tools_cannot_hold(arguments, expected):
    with pytest.raises(InputError, match=expected):
        SCANVAE(**SIZES, **arguments).to_scvi_tools()


def test_classifier_before_1_1_ended_in_a_softmax():
    """Its probabilities, by hand for a linear classifier, are the softmax of our logits."""
    reference = parity.Reference.read(FOLDER / "linear_classifier.npz")
    arguments = reference.arguments | {"classifier_parameters": {"logits": False}}
    vae = SCANVAE.from_scvi_tools(reference.weights, **arguments)
    weights = {k: v.numpy() for k, v in reference.weights.items()}
    scores = np.exp(
        reference.figures["q_z/loc"] @ weights["classifier.classifier.0.weight"].T
        + weights["classifier.classifier.0.bias"]
    )
    found = vae.classify(reference.tensors["X"]).softmax(-1).detach().numpy()
    expected = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=parity.TOLERANCE)


def test_label_groups_there_and_back():
    """Weights of groups, and probabilities as versions before 1.1 multiply them."""
    groups = np.array([0, 1, 0])
    arguments = SIZES | {"labels_groups": groups, "use_labels_groups": True}
    vae = SCANVAE(**arguments).eval()
    state = vae.to_scvi_tools()
    assert state["groups_index.0"].tolist() == [1, 0, 1]
    assert state["groups_index.1"].tolist() == [0, 1, 0]
    again = SCANVAE.from_scvi_tools(state, **arguments)
    x = torch.poisson(torch.full((5, 12), 3.0))
    z = vae.inference(x)["qz"].loc
    label = vae.classifier.labels(z).softmax(-1)
    group = vae.classifier.groups(z).softmax(-1)
    same = torch.from_numpy(groups[:, None] == groups)
    expected = label / (label @ same.to(label.dtype)) * group[:, groups]
    torch.testing.assert_close(again.classify(x).softmax(-1), expected)


# ---- methods --------------------------------------------------------------------------------


def test_loss_is_the_sum_of_its_parts(default):
    vae, inputs = default.model(), default.tensors
    outputs = vae.inference(inputs["X"])
    record = vae.loss(inputs, outputs, {}, kl_weight=0.2, labelled_tensors=inputs)
    parts = record.reconstruction_loss + 0.2 * record.kl_local
    torch.testing.assert_close(record.loss, parts.mean() + 50 * record.classification_loss)
    assert parts.shape == (48,) and record.kl_global == 0
    record.loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_loss_feeds_labels(default):
    """With known labels: minus log p(x, y) and no entropy of y; written out with one u a cell."""
    vae, inputs = default.model(), dict(default.tensors)
    known = (inputs["labels"] < 4).flatten()
    inputs = {k: v[known] for k, v in inputs.items()}
    outputs = vae.inference(inputs["X"])
    u = torch.randn(int(known.sum()), 4)
    trace = pyro.poutine.Trace()
    trace.add_node("u", name="u", type="sample", value=u, is_observed=False, infer={})
    with pyro.poutine.replay(trace=trace):
        record = vae.loss(inputs, outputs, feed_labels=True)
    y = torch.nn.functional.one_hot(inputs["labels"].flatten(), 4).float()
    covariates = (
        inputs["batch"],
        inputs["extra_continuous_covs"],
        inputs["extra_categorical_covs"],
    )
    px = vae.generative(outputs["z"], outputs["library"], *covariates)["px"]
    loc, scale = vae.z_decoder(u, y)
    q_u = torch.distributions.Normal(*vae.u_encoder(outputs["z"], y))
    kl_u = (q_u.loc**2 + q_u.scale**2 - 1 - 2 * q_u.scale.log()).sum(-1) / 2
    expected = (
        -px.log_prob(inputs["X"]).sum(-1)
        + outputs["qz"].log_prob(outputs["z"]).sum(-1)
        - torch.distributions.Normal(loc, scale).log_prob(outputs["z"]).sum(-1)
        + kl_u
        + np.log(4)
    )
    torch.testing.assert_close(record.reconstruction_loss + record.kl_local, expected)
    torch.testing.assert_close(record.loss, expected.mean())


def test_any_code_outside_the_labels_is_unlabelled(default):
    vae, inputs = default.model(), default.tensors
    outputs = vae.inference(inputs["X"])
    losses = []
    for code in (4, -7, 99):
        labels = torch.where(inputs["labels"] == 4, code, inputs["labels"])
        torch.manual_seed(0)
        changed = inputs | {"labels": labels}
        losses.append(
            vae.loss(changed, outputs, feed_labels=True, labelled_tensors=changed).loss.item()
        )
    assert len(set(losses)) == 1


@pytest.mark.parametrize("name", ["default", "latent_library"])
def test_loss_takes_the_posteriors_that_the_samples_came_from(name):
    """Not those of a second pass through the encoder, which may drop other units."""
    reference = parity.Reference.read(FOLDER / f"{name}.npz")
    vae, inputs = reference.model(), reference.tensors
    outputs = vae.inference(inputs["X"])
    wider = {
        k: None if q is None else torch.distributions.Normal(q.loc, 2 * q.scale)
        for k, q in outputs.items()
        if k in ("qz", "ql")
    }
    records = []
    for changed in ({}, {"qz": wider["qz"]}, wider):
        torch.manual_seed(0)
        records.append(vae.loss(inputs, outputs | changed))
    z = outputs["z"]
    gained = wider["qz"].log_prob(z).sum(-1) - outputs["qz"].log_prob(z).sum(-1)
    found = records[1].reconstruction_loss - records[0].reconstruction_loss
    torch.testing.assert_close(found, gained, rtol=1e-4, atol=1e-3)
    if name == "latent_library":
        prior = torch.distributions.Normal(
            vae.library_log_means[inputs["batch"]], vae.library_log_vars[inputs["batch"]].sqrt()
        )
        kls = [torch.distributions.kl_divergence(q, prior) for q in (wider["ql"], outputs["ql"])]
        found = records[2].kl_local - records[1].kl_local
        torch.testing.assert_close(found, (kls[0] - kls[1])[:, 0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("latent", [False, True])
def test_several_samples(latent):
    prior = {"library_log_means": [1.0], "library_log_vars": [1.0]} if latent else {}
    vae = SCANVAE(**SIZES, use_observed_lib_size=not latent, **prior).eval()
    x = torch.poisson(torch.full((5, 12), 3.0))
    outputs = vae.inference(x, n_samples=3)
    assert outputs["z"].shape == (3, 5, 4) and outputs["library"].shape == (3, 5, 1)
    assert outputs["qz"].loc.shape == (5, 4) and (outputs["ql"] is not None) == latent
    generation = vae.generative(outputs["z"], outputs["library"], torch.zeros(5))
    assert generation["px"].batch_shape == (3, 5, 12)
    assert (generation["pl"] is not None) == latent


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("latent", [False, True])
def test_shapes_of_predictive_samples(dispersion, latent):
    prior = {"library_log_means": [1.0], "library_log_vars": [1.0]} if latent else {}
    arguments = {"dispersion": dispersion, "use_observed_lib_size": not latent}
    vae = SCANVAE(**SIZES, **arguments, **prior).eval()
    tensors = {
        "X": torch.poisson(torch.full((5, 12), 3.0)),
        "labels": torch.tensor([0, 1, 2, 3, 3]),
    }
    assert vae.sample(tensors).shape == (5, 12)
    assert vae.sample(tensors, n_samples=3).shape == (5, 12, 3)


def test_predictive_samples_have_the_moments_of_the_model(default):
    """With a narrow q(z | x), mean and variance are those of p(x | z) at its mean."""
    vae, n = default.model(), 4000
    torch.nn.init.zeros_(vae.z_encoder.variance.weight)
    torch.nn.init.constant_(vae.z_encoder.variance.bias, -30)
    vae.z_encoder.var_eps = 1e-8
    inputs = {k: v[:6] for k, v in default.tensors.items()}
    torch.manual_seed(0)
    counts = vae.sample(inputs, n_samples=n)
    outputs = vae.inference(inputs["X"])
    covariates = (
        inputs["batch"],
        inputs["extra_continuous_covs"],
        inputs["extra_categorical_covs"],
    )
    px = vae.generative(outputs["z"], outputs["library"], *covariates)["px"]
    z_score = (counts.mean(-1) - px.mean) / (px.variance / n).sqrt()
    assert z_score.abs().max() < 5  # of 240; false alarm once in 7,000
    assert abs(z_score.square().mean() - 1) < 5 * np.sqrt(2 / 240)


def test_known_labels_choose_the_dispersion_of_predictive_samples():
    vae = SCANVAE(**SIZES, gene_likelihood="nb", dispersion="gene-label").eval()
    with torch.no_grad():
        vae.dispersion.log_theta[:] = torch.tensor([[-12.0], [12.0], [12.0]])
    tensors = {"X": torch.full((2, 12), 1000.0), "labels": torch.tensor([[0], [1]])}
    torch.manual_seed(0)
    zeros = (vae.sample(tensors, n_samples=50) == 0).float().mean((1, 2))
    assert zeros[0] > 0.95 and zeros[1] < 0.05


def test_classify_asks_a_factor_of_ones_own():
    class Stubborn(SCANVAE):
        def q_y(self, z, cells):
            return pyro.distributions.OneHotCategorical(logits=z.new_tensor([5.0, 0, 0]))

    logits = Stubborn(**SIZES).classify(torch.ones(2, 12))
    assert logits.softmax(-1)[..., 0].min() > 0.98


def test_transform_batch(default):
    vae, inputs = default.model(), default.tensors
    outputs = vae.inference(inputs["X"])
    arguments = (inputs["extra_continuous_covs"], inputs["extra_categorical_covs"])
    given = (outputs["z"], outputs["library"])
    batch = torch.full_like(inputs["batch"], 2)
    px = vae.generative(*given, batch, *arguments)["px"]
    moved = vae.generative(*given, inputs["batch"], *arguments, transform_batch=2)["px"]
    torch.testing.assert_close(px.mu, moved.mu)
    with pytest.raises(ValueError, match="transform_batch holds codes from 3"):
        vae.generative(*given, batch, *arguments, transform_batch=3)


# ---- errors ---------------------------------------------------------------------------------

WRONG = {
    "genes": ({"X": torch.ones(48, 39)}, r"shape \(48, 39\), expected \(cells, 40\)"),
    "negative": ({"X": -torch.ones(48, 40)}, "negative numbers"),
    "nan": ({"X": torch.full((48, 40), torch.nan)}, "NaN"),
    "rows": ({"X": torch.ones(47, 40)}, r"batch has shape \(48,\), expected \(47,\)"),
    "no X": ({"X": None}, "expected X"),
    "batch": ({"batch": torch.full((48, 1), 3)}, "codes from 3 to 3, expected 0 to 2"),
    "two batches": ({"batch": torch.zeros(48, 2)}, r"shape \(48, 2\), expected \(cells,\)"),
    "fraction": ({"batch": torch.full((48, 1), 0.5)}, "fractions"),
    "no batch": ({"batch": None}, "batch: none given"),
    "labels": ({"labels": torch.zeros(47)}, r"label has shape \(47,\), expected \(48,\)"),
    "no continuous": ({"extra_continuous_covs": None}, "continuous covariates: none given"),
    "continuous": ({"extra_continuous_covs": torch.ones(48, 2)}, r"expected \(48, 1\)"),
    "infinite": ({"extra_continuous_covs": torch.full((48, 1), torch.inf)}, "infinity"),
    "no categorical": ({"extra_categorical_covs": None}, "categorical covariates: none given"),
    "columns": ({"extra_categorical_covs": torch.ones(48, 1)}, r"expected \(48, 2\)"),
    "categories": (
        {"extra_categorical_covs": torch.full((48, 2), 2)},
        "categorical covariate 1 holds codes from 2 to 2, expected 0 to 1",
    ),
    "size factor": ({"size_factor": torch.ones(48, 1)}, "size_factor: given, but .* without"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=list(WRONG))
def test_minibatches_that_do_not_fit(default, changes, message):
    vae = default.model()
    outputs = vae.inference(default.tensors["X"])
    tensors = {k: v for k, v in (default.tensors | changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        vae.sample(tensors)
    with pytest.raises(ValueError, match=message):
        vae.loss(tensors, outputs)
    with pytest.raises(ValueError, match=message):
        vae.loss(default.tensors, outputs, labelled_tensors=tensors)


@pytest.mark.parametrize("value", [None, 0.0, -1.0, torch.nan])
def test_size_factors_that_do_not_fit(value):
    reference = parity.Reference.read(FOLDER / "size_factor.npz")
    tensors = dict(reference.tensors)
    del tensors["size_factor"]
    if value is not None:
        tensors["size_factor"] = torch.full((48, 1), value)
    with pytest.raises(ValueError, match="size_factor"):
        reference.model().sample(tensors)


def test_covariates_of_the_encoder():
    """They may be left out where nothing reads them; what is given is checked in any case."""
    x = torch.ones(2, 12)
    silent = SCANVAE(**SIZES, n_batch=2, n_continuous_cov=1).eval()
    assert silent.classify(x).shape == (2, 3)
    with pytest.raises(ValueError, match="continuous covariates"):
        silent.classify(x, cont_covs=torch.ones(2, 3))
    with pytest.raises(ValueError, match="categorical covariates: given, but .* without"):
        silent.inference(x, cat_covs=torch.ones(2, 1))
    reading = SCANVAE(**SIZES, n_batch=2, n_continuous_cov=1, encode_covariates=True).eval()
    with pytest.raises(ValueError, match="batch: none given"):
        reading.classify(x, cont_covs=torch.ones(2, 1))
    with pytest.raises(ValueError, match="continuous covariates: none given"):
        reading.inference(x, torch.zeros(2, 1))


def test_latents_that_do_not_fit():
    vae = SCANVAE(**SIZES, dispersion="gene-label").eval()
    z, library, batch = torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(2, 1)
    tensors = {"X": torch.ones(2, 12)}
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        vae.inference(tensors["X"], n_samples=0)
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\), expected \(..., cells, 4\)"):
        vae.generative(z[:, :3], library, batch)
    with pytest.raises(ValueError, match=r"library has shape \(2,\), expected \(2, 1\)"):
        vae.generative(z, library[:, 0], batch)
    with pytest.raises(ValueError, match="1 cells have no label in y"):
        vae.generative(z, library, batch, y=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="inference_outputs lack library"):
        vae.loss(tensors, {"z": z})
    with pytest.raises(ValueError, match=r"z has shape \(3, 2, 4\), expected \(2, 4\)"):
        vae.loss(tensors, {"z": z.expand(3, -1, -1), "library": library})
    with pytest.raises(ValueError, match="none of the 2 cells in labelled_tensors has a label"):
        vae.loss(tensors, {"z": z, "library": library}, labelled_tensors=tensors)

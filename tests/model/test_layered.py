"""The layered objective: the value of the ELBO, and the gradients of scVI and of M2 upon it."""

import pyro
import pytest
import torch
from pyro.distributions import Normal

from pyro_scanvi.model.objective import LayeredELBO, SemiSupervisedELBO
from pyro_scanvi.model.unsupervised import Unsupervised
from tests.examples import random_cells, small_vae

BELOW = ("z_encoder", "x_decoder", "dispersion", "l_encoder")  # follow the counts alone
LATENT_LIBRARY = {
    "use_observed_lib_size": False,
    "library_log_means": [1.0],
    "library_log_vars": [0.5],
}
VARIANTS = {"plain": {}, "latent library": LATENT_LIBRARY, "softmax": {"latent_distribution": "ln"}}


@pytest.fixture(params=VARIANTS, ids=str)
def vae(request):
    """In eval mode, so that two passes differ in nothing but their draws."""
    return small_vae(**VARIANTS[request.param]).double().eval()


def loss_of(kind, vae, cells, **settings):
    torch.manual_seed(5)
    return kind(vae.q_y, 7.0, **settings)(vae.model, vae.guide).parts(cells)


def gradients(loss, vae):
    names, parameters = zip(*vae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def is_below(name):
    return name.startswith(BELOW)


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"kl_weight": 0.3}, {"kl_weight": 0.3, "weighted": ("z", "u")}, {"num_particles": 3}],
    ids=str,
)
def test_the_value_is_that_of_the_elbo(vae, labels, settings):
    """And so are all parts of it."""
    cells = random_cells(vae, labels)
    one, other = (loss_of(k, vae, cells, **settings) for k in (LayeredELBO, SemiSupervisedELBO))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    assert one.kl.keys() == other.kl.keys()
    for name, kl in one.kl.items():
        torch.testing.assert_close(kl, other.kl[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", ["all", "none"])
def test_encoder_and_decoder_follow_scvi(vae, labels):
    """To the gradient of the unsupervised objective at the same draws, whatever the labels."""
    cells = random_cells(vae, labels)
    found = gradients(loss_of(LayeredELBO, vae, cells).loss, vae)
    story = Unsupervised(vae)
    torch.manual_seed(5)  # z is drawn first
    elbo = SemiSupervisedELBO(None, closed_form=("l",), weighted=("z", "l"))
    elbo.strict_enumeration_warning = False
    expected = gradients(elbo(story.model, story.guide).parts(cells).loss, vae)
    if vae.latent_library:
        pytest.skip("the library is drawn after u, and so is another number")
    for name in filter(is_below, found):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)


def test_what_stands_on_z_follows_scanvi(vae):
    """Networks of u, of z given u and y, and the classifier: the gradient of the ELBO itself."""
    cells = random_cells(vae, "mixed")
    one, other = (
        gradients(loss_of(k, vae, cells).loss, vae) for k in (LayeredELBO, SemiSupervisedELBO)
    )
    compared = [name for name in one if not is_below(name)]
    assert {name.split(".")[0] for name in compared} >= {"u_encoder", "z_decoder", "classifier"}
    for name in compared:
        torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-10)


def test_labels_and_types_do_not_move_the_encoder(vae):
    """But in the ELBO they do."""
    some, others = random_cells(vae, "all"), random_cells(vae, "all")
    others.label = (others.label + 1) % vae.n_labels
    moved = {}
    for kind in (LayeredELBO, SemiSupervisedELBO):
        one, other = (gradients(loss_of(kind, vae, c).loss, vae) for c in (some, others))
        names = [name for name in one if name.startswith("z_encoder")]
        moved[kind] = any(not torch.allclose(one[name], other[name]) for name in names)
    assert moved == {LayeredELBO: False, SemiSupervisedELBO: True}


def test_a_story_of_ones_own_without_z_is_left_as_it_is():
    """Nothing stands upon anything there."""

    def story(observed):
        def told(cells):
            with pyro.plate("cells", len(cells), dim=-1):
                w = pyro.sample("w", Normal(torch.zeros(len(cells)), 1.0))
                if observed:
                    pyro.sample("x", Normal(w, 2.0), obs=cells.x[:, 0])

        return told

    cells, losses = random_cells(small_vae(), "none"), []
    for kind in (LayeredELBO, SemiSupervisedELBO):
        elbo = kind(None)
        elbo.strict_enumeration_warning = False
        torch.manual_seed(0)
        losses.append(elbo(story(True), story(False)).parts(cells).loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)

"""A part of one's own that is wrong ends in an error that names it and shows all shapes."""

import pyro
import pytest
import torch
from pyro.distributions import Dirichlet, Normal, OneHotCategorical, Poisson
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_scanvi import SCANVAE, InputError, SemiSupervisedELBO
from pyro_scanvi.model import contracts
from tests.examples import random_cells, simulated, small_model, small_vae


class WithoutEvent(SCANVAE):
    def p_z(self, u, y, cells):
        return super().p_z(u, y, cells).base_dist


class CellsByCells(SCANVAE):
    """Batch shape (L, N, N)."""

    def p_z(self, u, y, cells):
        p = super().p_z(u, y, cells).base_dist
        return Normal(p.loc.unsqueeze(-2), p.scale.unsqueeze(-2)).to_event(1)


class Column(SCANVAE):
    """Batch shape (N, 1)."""

    def p_u(self, cells):
        return Normal(torch.zeros(len(cells), 1, self.n_latent), 1.0).to_event(1)


class WrongLabels(SCANVAE):
    def p_y(self, cells):
        return OneHotCategorical(torch.ones(5) / 5)


class WrongGenes(SCANVAE):
    def p_x(self, z, library, y, cells):
        return Poisson(torch.ones(len(cells), self.n_input - 1)).to_event(1)


class WrongInput(SCANVAE):
    """The networks stop, not Pyro."""

    def p_z(self, u, y, cells):
        return super().p_z(u[..., :2], y, cells)


class WrongElsewhere(SCANVAE):
    """q(u) has no event; it is p(z | u) that stops at its draw."""

    def q_u(self, z, y, cells):
        return Normal(super().q_u(z, y, cells).mean[..., 0], 1.0)


class Columns(SCANVAE):
    """A rate (N, 1) against counts (N,): all cells against all cells."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rate = nn.Linear(self.n_latent, 1)

    def observed(self, z, library, y, cells):
        p = Poisson(self.rate(z).exp())
        return super().observed(z, library, y, cells) | {"total": (p, cells.x[:, 0])}


class OneForAll(SCANVAE):
    """The mean over the cells of the minibatch, which would train."""

    def q_z(self, cells):
        q = super().q_z(cells).base_dist
        return Normal(q.loc.mean(0, keepdim=True), q.scale.mean(0, keepdim=True)).to_event(1)


class RandomDispersion(PyroModule):
    def __init__(self, sizes):
        super().__init__()
        prior = Normal(0.0, 1.0).expand([sizes.n_genes]).to_event(1)
        self.log_theta = PyroSample(prior)

    def forward(self, hidden, y, batch):
        return self.log_theta


class DrawnInAFactor(SCANVAE):
    def p_y(self, cells):
        pi = pyro.sample("pi", Dirichlet(torch.ones(self.n_labels)))
        return OneHotCategorical(pi)


class HalfShared(SCANVAE):
    def q_shared(self):
        return {"pi": Dirichlet(torch.ones(self.n_labels))}


BROKEN = {
    "no event": (WithoutEvent, "p_z of class WithoutEvent: Shape mismatch inside plate"),
    "N by N": (CellsByCells, "p_z of class CellsByCells: Error while packing tensors at site 'z'"),
    "N by 1": (Column, "p_u of class Column: Error while computing log_prob at site 'u'"),
    "labels": (
        WrongLabels,
        r"p_y of class WrongLabels: .*\n.*event shape \(5,\) from p_y of class",
    ),
    "genes": (WrongGenes, "p_x of class WrongGenes: Error while computing log_prob at site 'x'"),
    "input": (WrongInput, "p_z of class WrongInput: mat1 and mat2 shapes cannot be multiplied"),
    "elsewhere": (
        WrongElsewhere,
        r"Site 'u' has event shape \(4,\) from p_u of class SCANVAE and \(\) from q_u of class Wr",
    ),
    "columns": (
        Columns,
        r"observed of class Columns: the log probability of site 'total' of the model has shape "
        r"\((\d+), \1\), expected",
    ),
    "one for all": (
        OneForAll,
        r"q_z of class OneForAll: site 'z' has batch shape \(1,\), which .* to all \d+ cells",
    ),
    "drawn": (DrawnInAFactor, r"model draws site 'pi', which the guide does not.*\['pi'\]"),
    "half": (HalfShared, r"q_shared of class HalfShared: the guide draws site 'pi', which the mo"),
    "PyroSample": (
        {"dispersion": RandomDispersion},
        r"'log_theta' of RandomDispersion is a PyroSample, drawn inside .*p_shared\(\) and q_sha",
    ),
}


@pytest.mark.filterwarnings("ignore:Found .*vars in")  # Pyro says so too
@pytest.mark.parametrize("case", BROKEN)
def test_training_names_the_part_and_shows_the_shapes(case):
    kind, message = BROKEN[case]
    arguments = kind if isinstance(kind, dict) else {"module_class": kind}
    model = small_model(simulated(60), **arguments)
    with pytest.raises(InputError, match=message) as raised:
        model.train(1, batch_size=32, progress_bar=False)
    said = str(raised.value)
    assert said.count("Sites of the guide (batch | event):") == 1
    assert "z dist" in said and "encoder" not in said, "parameters are not listed"


def test_the_shapes_are_those_of_the_run():
    vae = WithoutEvent(n_input=20, n_labels=3, n_hidden=8, n_latent=4)
    cells = random_cells(vae, n=11)
    traces = contracts.partial_traces(vae.model, vae.guide, cells)
    table = [" ".join(row.split()) for row in contracts.shapes_of(*traces).splitlines()]
    assert table[1:3] == ["z dist 11 | 4", "value 11 | 4"] and "u dist 3 11 | 4" in table


def test_what_is_no_mistake_of_shapes_stays_as_it_is():
    """A full memory, and what no factor is to blame for."""
    vae = small_vae()
    for error in (MemoryError(), torch.OutOfMemoryError("full"), ValueError("from nowhere")):
        found = contracts.explained(error, vae, vae.model, vae.guide, random_cells(vae))
        assert found is error


def test_later_steps_are_not_looked_at():
    """Where validation is off neither plate nor objective asks."""
    vae = OneForAll(n_input=20, n_labels=3, n_hidden=8, n_latent=4)
    objective = SemiSupervisedELBO(vae.q_y)(vae.model, vae.guide)
    with pyro.validation_enabled(False):
        assert objective(random_cells(vae)).isfinite()
    with pytest.raises(InputError, match="batch shape"):
        objective(random_cells(vae))


def test_a_minibatch_of_one_cell_may_have_batch_shape_one():
    vae = OneForAll(n_input=20, n_labels=3, n_hidden=8, n_latent=4).eval()
    assert SemiSupervisedELBO(vae.q_y)(vae.model, vae.guide)(random_cells(vae, n=1)).isfinite()

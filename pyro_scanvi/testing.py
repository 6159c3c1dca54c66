"""Checks of parts of one's own, for one's own tests.

A class that changes a factor, a likelihood or a dispersion is built on small random data and taken
through what a model has to stand: enumeration, gradients, questions, a folder, new categories.
:data:`CHECKS` lists what is asked. A check that fails is an AssertionError of one sentence: which
part, what it gave, what was expected, what to do.

Everything is seeded: a part passes or fails for good. The only checks that are statistical, those
of means against draws, would fail a right part for one seed in a million.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.model.construction import likelihood_of
from pyro_scanvi.model.contracts import BROKEN, explained, named
from pyro_scanvi.model.likelihoods import GeneLikelihood, Sizes, elementwise, reads_label
from pyro_scanvi.model.objective import ObjectiveParts, SemiSupervisedELBO
from pyro_scanvi.model.pyro_internals import Site, enumeration_dim, in_cells, own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import first, listed
from pyro_scanvi.storage.parts import name_of_part, parts_in
from pyro_scanvi.validation import InputError

N_CELLS, N_GENES, N_ALL = 17, 13, 60  # of a minibatch; unlike all other sizes, so that none hides
SMALL: dict[str, Any] = {"n_hidden": 7, "n_latent": 5}
N_DRAWS = 2000
FALSE_ALARMS = 1e-6
ROUNDING = 1e-3  # of log probabilities of some tens of nats, in float32
MOST_COUNTS = 2048


@dataclass(frozen=True)
class Subject:
    """What is checked: a class and its arguments, of which every check makes a model of its own.

    Attributes
    ----------
    adata
        Set up; the model's data.
    module_class, arguments
        As for :class:`~pyro_scanvi.SCANVI`.
    """

    adata: ad.AnnData
    module_class: type[SCANVAE] = SCANVAE
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> SCANVI:
        """A new one; questions to it are allowed."""
        model = SCANVI(self.adata, module_class=self.module_class, **(SMALL | dict(self.arguments)))
        model.is_trained = True
        return model

    @property
    def name(self) -> str:
        """Of its class, and of the parts that it was given."""
        parts = [f"{place}={name_of_part(p)}" for place, p in parts_in(self.arguments).items()]
        return f"{self.module_class.__name__}({', '.join(parts)})"


Check = Callable[[Subject], None]


def check_model(
    module_class: type[SCANVAE] = SCANVAE, adata: ad.AnnData | None = None, **arguments: Any
) -> None:
    """Check a class of one's own: every entry of :data:`CHECKS`, with and without a latent library.

    Parameters
    ----------
    module_class
        :class:`~pyro_scanvi.SCANVAE` or a subclass.
    adata
        Some tens of cells that ``SCANVI.setup_anndata`` has seen, for a class that needs what the
        random ones lack; None is random counts with two batches, three labels, unlabelled cells, a
        categorical and a continuous covariate.
    **arguments
        As for :class:`~pyro_scanvi.SCANVI`.

    Raises
    ------
    AssertionError
        It names the part, what it gave, what was expected and what to do.

    Examples
    --------
    >>> from pyro.distributions import StudentT
    >>> class HeavyTailed(SCANVAE):
    ...     def p_u(self, cells):
    ...         zero = self.y_prior.new_zeros(self.n_latent)
    ...         return StudentT(4.0, zero, zero + 1).to_event(1)
    >>> check_model(HeavyTailed)
    """
    subject = Subject(random_cells() if adata is None else adata, module_class, arguments)
    _run(CHECKS, subject)
    size_is_said = "use_observed_lib_size" in arguments or subject.model().fields.size_factor_key
    if not size_is_said:
        latent = replace(subject, arguments={**arguments, "use_observed_lib_size": False})
        _run(CHECKS_OF_TRACES, latent)


def check_likelihood(gene_likelihood: GeneLikelihood | Callable, **arguments: Any) -> None:
    """Check a likelihood of counts, in a model that has it.

    Parameters
    ----------
    gene_likelihood, **arguments
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    AssertionError
        As :func:`check_model`.
    """
    given = {"gene_likelihood": gene_likelihood, **arguments}
    subject = Subject(random_cells(), arguments=given)
    _run([*CHECKS, *CHECKS_OF_LIKELIHOODS], subject)


def check_dispersion(make: Callable[[Sizes], nn.Module], **arguments: Any) -> None:
    """Check a dispersion, in a model that has it.

    Parameters
    ----------
    make, **arguments
        `dispersion` and others as for :class:`~pyro_scanvi.SCANVAE`. The likelihood is "nb" unless
        given.

    Raises
    ------
    AssertionError
        As :func:`check_model`.
    """
    given = {"gene_likelihood": "nb", "dispersion": make, **arguments}
    _run([*CHECKS_OF_DISPERSIONS, *CHECKS], Subject(random_cells(), arguments=given))


def random_cells() -> ad.AnnData:
    """Counts of 60 cells and 13 genes, set up with all that a model may read."""
    rng = np.random.default_rng(0)
    kind = np.arange(N_ALL) % 3
    means = 4 * np.exp(rng.normal(size=(3, N_GENES)))
    obs = pd.DataFrame(
        {
            "label": np.where(rng.random(N_ALL) < 0.5, np.array(["a", "b", "c"])[kind], "Unknown"),
            "batch": np.array(["one", "two"])[rng.integers(2, size=N_ALL)],
            "donor": np.array(["d1", "d2"])[rng.integers(2, size=N_ALL)],
            "age": rng.normal(size=N_ALL),
        },
        index=[f"cell{i}" for i in range(N_ALL)],
    )
    counts = rng.poisson(means[kind]).astype(np.float32) + 1
    adata = ad.AnnData(counts, obs, pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]))
    covariates = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    SCANVI.setup_anndata(adata, "label", "Unknown", batch_key="batch", **covariates)
    return adata


# ---- the checks ---------------------------------------------------------------------------------


def shapes_fit(subject: Subject) -> None:
    """Factors have batch shape (..., N) under enumeration, and model and guide the same sites."""
    vae, cells = subject.model().module.train(), minibatch(subject.model())
    try:
        with pyro.validation_enabled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro warns of what is refused by name
            objective_parts(vae, cells)
    except BROKEN as error:
        said = explained(error, vae, vae.model, vae.guide, cells)
        raise AssertionError(str(said)) from error


def posterior_is_reparameterised(subject: Subject) -> None:
    """Sites of the guide that are drawn have rsample."""
    vae, cells = subject.model().module, minibatch(subject.model())
    guide, _ = traces(vae, cells, enumerated=True)
    for name, site in latent(guide).items():
        if enumeration_dim(site) is None and not site["fn"].has_rsample:
            kind = type(elementwise(site["fn"])).__name__
            raise AssertionError(
                f"{named(vae, name, 'q')} draws site {name!r} from a {kind}, which has no rsample, "
                "expected one that is reparameterised: the gradient would be a score-function "
                "estimate, which is far noisier; take another distribution, or enumerate it"
            )


def gradients_reach_all(subject: Subject) -> None:
    """Every trainable parameter gets a finite gradient from the loss."""
    model = subject.model()
    vae = model.module.train()
    objective_parts(vae, minibatch(model)).loss.backward()
    trained = [(name, p.grad) for name, p in vae.named_parameters() if p.requires_grad]
    without = [name for name, gradient in trained if gradient is None]
    if without:
        raise AssertionError(
            f"{subject.name}: {len(without)} parameters get no gradient{first(without)}, expected "
            "all: no factor reads them, or a detach() lies between; leave them out, of a "
            "likelihood by GeneLikelihood(..., uses_gate=False, uses_theta=False), or set "
            "requires_grad_(False)"
        )
    wild = [name for name, g in trained if g is not None and not g.isfinite().all()]
    if wild:
        raise AssertionError(
            f"{subject.name}: gradients of {len(wild)} parameters are not finite{first(wild)}, "
            "expected finite ones: look for a logarithm or a root of 0"
        )


def evaluation_is_repeatable(subject: Subject) -> None:
    """In eval mode a seed repeats an answer, whatever was asked in between; nothing is left."""
    model = subject.model()
    vae, before = model.module, attributes(model.module)
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    cells, others = minibatch(model), minibatch(model, start=N_CELLS)
    answers = [objective_parts(vae, c).elbo().detach() for c in (cells, others, cells)]
    left = sorted(attributes(vae) - before)
    if left:
        raise AssertionError(
            f"{subject.name}: {listed(left)} was left on the model by a minibatch, expected "
            "nothing: hand it on as an argument, or as a draw in cells.shared"
        )
    moved = [n for n, tensor in vae.state_dict().items() if not torch.equal(tensor, state[n])]
    if moved or not torch.equal(answers[0], answers[2]):
        changed = f"{listed(moved)} moved" if moved else "its ELBO differs"
        raise AssertionError(
            f"{subject.name}: asked twice about the same cells with the same seed in eval mode, "
            f"{changed} ({answers[0].mean():.6f} and {answers[2].mean():.6f} nats), expected the "
            "same bits: a factor keeps nothing, and draws by torch alone"
        )


def cells_stand_alone(subject: Subject) -> None:
    """In eval mode what a factor says of a cell does not depend on the cells beside it."""
    model = subject.model()
    vae, few = model.module, N_CELLS // 2
    together = traces(vae, minibatch(model))
    alone = traces(vae, minibatch(model, n=few), values=first_cells(together[0], few))
    for side, whole, part in zip("qp", together, alone, strict=True):
        for name, site in own_sites(part).items():
            found = log_prob(site)
            expected = log_prob(own_sites(whole)[name])
            if in_cells(site):
                expected = expected.expand(N_CELLS)[:few]
            if worst := _unlike(found, expected):
                raise AssertionError(
                    f"{named(vae, name, side)}: the log probability of site {name!r} of a cell is "
                    f"{worst[0]:.4f} in a minibatch of {few} cells and {worst[1]:.4f} in one of "
                    f"{N_CELLS}, expected the same: a factor treats each cell by itself, so take "
                    "no mean, sum or norm over cells"
                )


def labels_stand_alone(subject: Subject) -> None:
    """With labels enumerated a factor says of each what it says of that label given alone."""
    model = subject.model()
    vae, cells = model.module, minibatch(model)
    together = traces(vae, cells, enumerated=True)
    sizes = enumerated_sizes(together[0])
    for label in range(max(sizes.values(), default=0)):
        alone = traces(vae, cells, values=at_label(together[0], sizes, label))
        for side, whole, part in zip("qp", together, alone, strict=True):
            _check_label(vae, side, (whole, part), sizes, label)


def _check_label(
    vae: SCANVAE, side: str, traces: tuple[Trace, Trace], dims: Iterable[int], label: int
) -> None:
    """Log probabilities of a label among all of them, and alone."""
    whole, part = map(own_sites, traces)
    for name, site in part.items():
        expected = log_prob(site)
        found = _select(log_prob(whole[name]), dims, label).expand_as(expected)
        if worst := _unlike(found, expected):
            raise AssertionError(
                f"{named(vae, name, side)}: with all labels enumerated the log probability of site "
                f"{name!r} of a cell and label {label} is {worst[0]:.4f}, of that label alone "
                f"{worst[1]:.4f}, expected the same: y has a "
                "dimension of labels on the left, so read it by operations over its last dimension "
                "alone, as y.argmax(-1) or y @ matrix"
            )


def means_are_those_of_draws(subject: Subject) -> None:
    """The mean of each observed site is that of its draws: a z test, Bonferroni over features."""
    vae = subject.model().module
    for name, fn in observed(vae, minibatch(subject.model())):
        try:
            told, drawn = fn.mean, fn.sample(torch.Size([N_DRAWS]))
        except NotImplementedError:
            continue
        _check_mean(f"{named(vae, name, 'p')} in {subject.name}", told, drawn, len(fn.event_shape))


def counts_sum_to_one(subject: Subject) -> None:
    """Over all counts the probabilities of each gene of each cell sum to 1."""
    vae = subject.model().module
    for name, joint in observed(vae, minibatch(subject.model())):
        fn = elementwise(joint)
        if not _is_of_counts(fn):
            continue
        counts = torch.arange(float(MOST_COUNTS)).reshape(-1, *[1] * len(fn.batch_shape))
        total = fn.log_prob(counts).exp().sum(0)
        worst = total.reshape(-1)[(total - 1).abs().argmax()]
        if not abs(worst - 1) < 10 * ROUNDING:
            raise AssertionError(
                f"{named(vae, name, 'p')} in {subject.name}: the probabilities of the counts 0 to "
                f"{MOST_COUNTS - 1} of a {type(fn).__name__} sum to {worst:.4f}, expected 1: see "
                "the normalising constant of its log_prob"
            )


def it_trains(subject: Subject) -> None:
    """An epoch of SCANVI.train, after which loss and weights are finite."""
    with _said_of(subject, "trained"):
        model = subject.model().train(1, batch_size=N_CELLS, progress_bar=False, accelerator="cpu")
    wild = [name for name, p in model.module.state_dict().items() if not p.isfinite().all()]
    if wild or not np.isfinite(model.history["elbo"]).all():
        raise AssertionError(
            f"{subject.name}: after an epoch {listed(wild) or 'the ELBO'} is not finite, expected "
            "finite weights and losses: bound what an exp() is taken of"
        )


def it_is_saved(subject: Subject) -> None:
    """Saved and opened its answers are equal to the bit."""
    model = subject.model()
    for _ in range(2):  # moves statistics, and what is kept where it should not be
        objective_parts(model.module.train(), minibatch(model))
    model.module.eval()
    with tempfile.TemporaryDirectory() as folder, _said_of(subject, "saved and opened"):
        path = Path(folder) / "model"
        model.save(path)
        parts = parts_in(model.vae_arguments)
        again = SCANVI.load(path, subject.adata, subject.module_class, parts or None)
        query = SCANVI.load_query_data(
            subject.adata.copy(), path, module_class=subject.module_class, parts=parts or None
        )
    for opened, how in ((again, "load"), (query, "load_query_data")):
        answers = [
            m.predict(soft=True, method="classifier", seed=0).to_numpy() for m in (model, opened)
        ]
        elbos = [m.get_elbo(seed=0) for m in (model, opened)]
        if not (np.array_equal(*answers) and elbos[0] == elbos[1]):
            raise AssertionError(
                f"{subject.name}: saved and opened by {how} its ELBO is {elbos[1]:.6f} where it "
                f"was {elbos[0]:.6f}, expected the same bits: what is computed with is an "
                "argument of the constructor, a parameter or a buffer (register_buffer)"
            )


def it_grows(subject: Subject) -> None:
    """With a new label and a new batch it answers, and old cells stay where they were."""
    model = subject.model()
    new, labels = _with_new_categories(model)
    with _said_of(subject, f"mapped onto cells of a new batch, with new labels {labels}"):
        query = SCANVI.load_query_data(new, model, extend_labels=labels)
        probabilities = query.predict(soft=True, method="classifier").to_numpy()
    shapes_fit(replace(subject, adata=new))
    n_labels = len(model.fields.classes) + len(labels)
    if probabilities.shape[1] != n_labels or not np.isfinite(probabilities).all():
        raise AssertionError(
            f"{subject.name}: with new labels it gives probabilities {probabilities.shape}, "
            f"expected finite ones of {n_labels} labels: see how the classifier grows"
        )
    old = np.arange(N_CELLS)  # of old batches
    was, now = (m.get_latent_representation(indices=old, seed=0) for m in (model, query))
    if not np.allclose(was, now, rtol=ROUNDING, atol=ROUNDING):
        raise AssertionError(
            f"{subject.name}: with a new label and a new batch old cells move by up to "
            f"{np.abs(was - now).max():.4f} in the latent space, expected nothing: "
            "old entries keep their places, see the rules given to grows()"
        )


def likelihood_tells_its_parameters(subject: Subject) -> None:
    """What is told of it, and a draw of expression, has the shape of the counts."""
    model = subject.model()
    vae, cells = model.module, minibatch(model)
    likelihood, size = likelihood_of(subject.arguments["gene_likelihood"]), cells.x.sum(-1, True)
    with torch.no_grad():
        z, y = vae.latent_point(vae.q_z(cells)), vae.one_hot_labels(cells)
        p = vae.count_parameters(z, size, y, cells)
        fn, told = likelihood.distribution(p), {}
        try:
            told = dict(likelihood.parameters(fn))
        except NotImplementedError as error:
            raise AssertionError(
                f"{subject.name}: {type(fn).__name__} does not tell its mean, expected one for "
                "get_likelihood_parameters: give it a property mean, or say by "
                "GeneLikelihood(..., parameters=) what is told"
            ) from error
        told["denoised"] = likelihood.expression_draw(p)
    for name, tensor in told.items():
        if not _broadcasts(tensor, cells.x.shape):
            raise AssertionError(
                f"{subject.name}: {name!r} has shape {tuple(tensor.shape)}, expected that of the "
                f"counts, {tuple(cells.x.shape)}"
            )


def dispersion_fits(subject: Subject) -> None:
    """Log theta is broadcastable to (..., N, G), and reads the label only if it says so."""
    vae = subject.model().module
    cells, part = minibatch(subject.model()), vae.dispersion
    given = subject.arguments["dispersion"]
    hidden = torch.randn(len(cells), vae.x_decoder.hidden.n_out)
    labels = torch.eye(vae.n_labels).unsqueeze(-2)  # as enumeration gives them: L, 1, L
    wanted = (vae.n_labels, len(cells), vae.n_input)
    with torch.no_grad():
        theta = part(hidden, labels.expand(*wanted[:2], -1), cells.batch)
    if not _broadcasts(theta, wanted):
        raise AssertionError(
            f"dispersion {name_of_part(given)} gives log theta of shape {tuple(theta.shape)}, "
            f"expected one that broadcasts to (labels, cells, genes) = {wanted}"
        )
    varies = theta.ndim == len(wanted) and bool((theta != theta[:1]).any())
    if varies and not reads_label(part):
        raise AssertionError(
            f"dispersion {name_of_part(given)} differs between labels and says "
            "reads_label = False, expected True: questions would decode cells without their label"
        )


# What is asked of traces alone, and of every model. Another check is a function and an entry here.
CHECKS_OF_TRACES: tuple[Check, ...] = (
    shapes_fit,
    posterior_is_reparameterised,
    gradients_reach_all,
    evaluation_is_repeatable,
    cells_stand_alone,
    labels_stand_alone,
    means_are_those_of_draws,
    counts_sum_to_one,
)
CHECKS: tuple[Check, ...] = (*CHECKS_OF_TRACES, it_trains, it_is_saved, it_grows)
CHECKS_OF_LIKELIHOODS: tuple[Check, ...] = (likelihood_tells_its_parameters,)
CHECKS_OF_DISPERSIONS: tuple[Check, ...] = (dispersion_fits,)


# ---- what they read -----------------------------------------------------------------------------


def minibatch(model: SCANVI, n: int = N_CELLS, start: int = 0) -> Cells:
    """Some cells of its data, labelled and not."""
    return model.encoded(None, None)[0][np.arange(start, start + n)]


def objective_parts(vae: SCANVAE, cells: Cells) -> ObjectiveParts:
    """Of the objective as it comes, with a seed of its own."""
    objective = SemiSupervisedELBO(vae.q_y, point=vae.latent_point)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return objective.parts(vae.model, vae.guide, cells)


def traces(
    vae: SCANVAE, cells: Cells, enumerated: bool = False, values: Trace | None = None
) -> tuple[Trace, Trace]:
    """Guide, and model at its draws; at given values where there are some."""
    guide: Callable = vae.guide
    if enumerated:
        guide = poutine.enum(guide, first_available_dim=-2)
    if values is not None:
        guide = poutine.replay(guide, trace=values)
    with torch.no_grad(), pyro.validation_enabled(False), torch.random.fork_rng():
        torch.manual_seed(0)
        guide_trace = poutine.trace(guide).get_trace(cells)
        replayed = poutine.replay(vae.model, trace=guide_trace)
        return guide_trace, poutine.trace(replayed).get_trace(cells)


def latent(trace: Trace) -> dict[str, Site]:
    """Those that are drawn."""
    return {name: site for name, site in own_sites(trace).items() if not site["is_observed"]}


def observed(vae: SCANVAE, cells: Cells) -> Iterator[tuple[str, Distribution]]:
    """What is seen of the cells, by site, at a draw of the guide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, site in own_sites(traces(vae, cells)[1]).items():
            if site["is_observed"]:
                yield name, site["fn"]


def log_prob(site: Site) -> Tensor:
    """At its value, (N,) or a scalar; 0 where it is masked."""
    found = site["fn"].log_prob(site["value"])
    return found if site["mask"] is None else torch.where(site["mask"], found, torch.zeros(()))


def with_values(trace: Trace, change: Callable[[Site], Tensor]) -> Trace:
    """The sites of a trace with other values, to be replayed."""
    changed = Trace()
    for name, site in own_sites(trace).items():
        changed.add_node(name, **(site | {"value": change(site)}))
    return changed


def first_cells(trace: Trace, n: int) -> Trace:
    """The draws of the first cells."""

    def value(site: Site) -> Tensor:
        dim = -1 - site["fn"].event_dim
        return site["value"].narrow(dim, 0, n) if in_cells(site) else site["value"]

    return with_values(trace, value)


def enumerated_sizes(trace: Trace) -> dict[int, int]:
    """Of each dimension that is enumerated, counted from the right of the batch shape."""
    sizes = {}
    for site in latent(trace).values():
        if (dim := enumeration_dim(site)) is not None:
            sizes[dim] = site["value"].shape[dim - site["fn"].event_dim]
    return sizes


def at_label(trace: Trace, dims: Iterable[int], label: int) -> Trace:
    """Draws at one value of what is enumerated in those dimensions."""

    def value(site: Site) -> Tensor:
        event_dim = site["fn"].event_dim
        found = _select(site["value"], [d - event_dim for d in dims], label)
        shape = found.shape[found.ndim - event_dim :]
        return found.expand(N_CELLS, *shape) if in_cells(site) else found

    return with_values(trace, value)


def attributes(module: nn.Module) -> set[str]:
    """Of it and of all modules inside, by name."""
    return {f"{name}.{own}".lstrip(".") for name, m in module.named_modules() for own in vars(m)}


@contextmanager
def _said_of(subject: Subject, what: str) -> Iterator[None]:
    """A refusal as a failed check."""
    try:
        yield
    except (InputError, TypeError, *BROKEN) as error:
        raise AssertionError(f"{subject.name} cannot be {what}: {error}") from error


def _run(checks: Iterable[Check], subject: Subject) -> None:
    for check in checks:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            check(subject)


def _check_mean(part: str, told: Tensor, drawn: Tensor, event_dim: int) -> None:
    """Of each feature, over cells and draws."""
    cells = list(range(told.ndim - event_dim))
    expected = told.mean(cells)
    found, n = drawn.mean([0, *[d + 1 for d in cells]]), drawn[..., None].numel() / expected.numel()
    spread = (drawn.var(0).mean(cells) / n).sqrt()
    limit = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(expected.numel(), 1))
    off = (found - expected).abs() - limit * spread - 1e-4 * (1 + expected.abs())
    if (off > 0).any():
        worst = off.argmax()
        raise AssertionError(
            f"{part}: the mean that its distribution tells is {expected.reshape(-1)[worst]:.4f}, "
            f"that of {N_DRAWS} draws is {found.reshape(-1)[worst]:.4f}, expected the same (the "
            f"difference is {limit:.1f} standard errors or more): mend its mean or its sample"
        )


def _unlike(found: Tensor, expected: Tensor) -> tuple[float, float] | None:
    """The two log probabilities that differ most; None where all are equal but for rounding."""
    if torch.allclose(found, expected, rtol=ROUNDING, atol=ROUNDING):
        return None
    worst = (found - expected).abs().argmax()
    return found.reshape(-1)[worst].item(), expected.reshape(-1)[worst].item()


def _select(tensor: Tensor, dims: Iterable[int], place: int) -> Tensor:
    """At a place of dimensions, as far as it has them; a size of 1 stands for all places."""
    for dim in sorted(dims):  # from the left, so that the others stay where they are
        if tensor.ndim >= -dim:
            tensor = tensor.select(dim, place % tensor.shape[dim])
    return tensor


def _broadcasts(tensor: Tensor, wanted: Sequence[int]) -> bool:
    """Whether it can be expanded to a shape."""
    missing = len(wanted) - tensor.ndim
    pairs = zip(tensor.shape, wanted[missing:], strict=True) if missing >= 0 else [(0, 1)]
    return all(size in (1, of) for size, of in pairs)


def _is_of_counts(fn: Distribution) -> bool:
    """Whether it is of the numbers 0, 1, 2, ... without an end."""
    try:
        support: Any = fn.support
    except NotImplementedError:
        return False
    ends = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    return bool(support is not None and support.is_discrete and ends == (0, None))


def _with_new_categories(model: SCANVI) -> tuple[ad.AnnData, list[str]]:
    """Its cells, those after the first few of a new batch and, unless there are groups, a label."""
    fields, new = model.fields, model.adata.copy()
    later = np.arange(len(new)) >= N_CELLS
    if fields.batch_key:
        new.obs[fields.batch_key] = np.where(later, "new", new.obs[fields.batch_key].astype(str))
    if model.vae_arguments.get("labels_groups") is not None:
        return new, []
    labels = new.obs[fields.labels_key].astype(str).to_numpy()
    renamed = later & (labels != str(fields.unlabeled_category)) & (np.arange(len(new)) % 2 == 0)
    new.obs[fields.labels_key] = np.where(renamed, "new", labels)
    return new, ["new"]

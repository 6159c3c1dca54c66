r"""scANVI as a Pyro program: one method for each factor of the model p and of the guide q.

.. math::

    u &\sim \mathcal N(0, I) && \text{state within a cell type} \\
    y &\sim \mathrm{Categorical}(\pi) && \text{cell type} \\
    e \mid y &\sim p(e \mid y) && \text{what is known of the type: a label, a set, nothing} \\
    z \mid u, y &\sim \mathcal N(\mu_z(u, y), \sigma_z^2(u, y)) && \text{cell state} \\
    l \mid s &\sim \mathrm{LogNormal}(m_s, v_s) && \text{library size, unless it is observed} \\
    x_g \mid z, l, s, c &\sim \mathrm{ZINB}(l\,\rho_g(z, s, c),\ \theta_g,\ h_g(z, s, c))
        && \text{counts}

with the guide :math:`q(z \mid x, s, c)\, q(y \mid z, e)\, q(u \mid z, y)\, q(l \mid x, s, c)`,
where :math:`q(y \mid z, e) \propto q(y \mid z)\, p(e \mid y)`: a known label is a point.
Batch is s, further covariates are c. Xu et al. (2021), Mol Syst Biol 17:e9620; Kingma et al.
(2014), arXiv 1406.5298 (M1+M2); Lopez et al. (2018), Nat Methods 15:1053 (scVI).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import LogNormal, OneHotCategorical, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import LOG_IMPOSSIBLE, Cells
from pyro_scanvi.model import arguments
from pyro_scanvi.model.construction import (
    DataSizes,
    Layers,
    check_one_size,
    covariate_encoder,
    encoder,
    label_classifier,
    latent_transform,
    library_priors,
    likelihood_of,
)
from pyro_scanvi.model.contracts import in_plate
from pyro_scanvi.model.growth import (
    ByBatch,
    ByCovariates,
    ByLabel,
    Rule,
    from_the_data,
    label_prior,
    told,
)
from pyro_scanvi.model.label_noise import LABEL_NOISE, LabelNoise, LabelSizes
from pyro_scanvi.model.labels import CertainLabel, LabelCategorical, at_label
from pyro_scanvi.model.likelihoods import (
    DISPERSIONS,
    CountParameters,
    GeneLikelihood,
    Sizes,
    reads_label,
)
from pyro_scanvi.model.networks import CountDecoder, NormalNetwork
from pyro_scanvi.model.normals import Normal
from pyro_scanvi.model.pyro_internals import announce, checked_start, samples
from pyro_scanvi.model.scvi_interface import PiecewiseInterface
from pyro_scanvi.validation import InputError

N_DRAWS_OF_A_POINT = 100


class SCANVAE(PiecewiseInterface):
    """The model, the guide and their networks; the interface of scvi-tools' SCANVAE.

    To change a factor, override its method (``p_u``, ``p_z``, ``q_z``, ...): it takes its parents
    and returns a Distribution. ``model`` and ``guide`` do the sampling and stay as they are.

    Parameters
    ----------
    n_input
        Number of genes, G.
    n_batch
        Number of biological batches; 0 counts as 1.
    n_labels
        Number of labels, L, at least 2. "Unlabelled" is not one of them.
    n_hidden, n_latent, n_layers
        Units of a hidden layer, dimensions K of z and of u, and number of hidden layers.
    n_continuous_cov
        Number of continuous covariates.
    n_cats_per_cov
        Number of categories of each categorical covariate.
    dropout_rate
        Of encoders and classifier; the decoders have no dropout.
    dispersion
        Which inverse dispersions differ: "gene", "gene-batch", "gene-label" or "gene-cell", or
        a callable from :class:`~pyro_scanvi.model.likelihoods.Sizes` to a module that returns log
        theta.
    log_variational
        The encoder sees log(1 + x) instead of x.
    gene_likelihood
        "zinb", "nb" or "poisson", or a :class:`~pyro_scanvi.model.likelihoods.GeneLikelihood`, or a
        callable from :class:`~pyro_scanvi.model.likelihoods.CountParameters` to a Distribution.
    y_prior
        Probability of each label; None is uniform.
    labels_groups, use_labels_groups
        Group of each label, numbered from 0 without gaps. The classifier then gives the
        probability of the group times that of the label within its group.
    classifier_parameters
        Overrides `n_hidden`, `n_layers` and `dropout_rate` of the classifier.
    use_batch_norm, use_layer_norm
        "encoder" (encoders and classifier), "decoder" (decoders of x and z), "both" or "none".
    latent_distribution
        "normal", or "ln": classifier, u encoder and decoder see softmax(z), a logistic normal.
    encode_covariates
        The encoder of z sees batch and covariates too.
    deeply_inject_covariates
        Categorical covariates join the input of every hidden layer, not of the first only.
    use_observed_lib_size
        The library size is the cell's total count; otherwise it is latent.
    library_log_means, library_log_vars
        Mean and variance of the log library of each batch, for a latent library.
    use_size_factor_key
        The size of a cell is given; expression is then softplus, not proportions.
    linear_classifier
        Classify z by one linear layer.
    var_activation
        Makes the encoders' variances positive; None is exp.
    batch_representation
        "one-hot" or "embedding".
    batch_embedding_kwargs
        ``embedding_dim``, 5 by default.
    label_noise
        How given labels err: "none"; "rate", a learned rate of errors; "learned", a learned
        confusion matrix; "dirichlet", one with a posterior; or a callable from
        :class:`~pyro_scanvi.model.label_noise.LabelSizes` to a part, such as
        :class:`~pyro_scanvi.model.label_noise.FixedNoise`.
    n_annotators
        Number of annotators, each of whom has a noise of its own.
    extra_encoder_kwargs, extra_decoder_kwargs
        ``activation`` and ``bias`` of the hidden layers of the encoders of z and l, and of the
        decoder of x.
    n_extra
        Number of columns of each of the data in ``cells.extra``, by name; kept as ``self.n_extra``
        for factors of one's own.

    Raises
    ------
    TypeError
        For an unknown argument; the error names the nearest.
    InputError
        For a wrong size, value or combination.

    Examples
    --------
    >>> import torch
    >>> from pyro_scanvi import SCANVAE, Cells, SemiSupervisedELBO
    >>> vae = SCANVAE(n_input=5, n_labels=2, n_hidden=4, n_latent=2)
    >>> label = torch.tensor([0, 1, -1, -1, -1, -1])  # -1 is not known
    >>> cells = Cells.from_counts(torch.ones(6, 5), label=label)
    >>> objective = SemiSupervisedELBO(vae.q_y)(vae.model, vae.guide)
    >>> objective(cells).backward()
    >>> vae.classify(cells.x).softmax(-1).shape
    torch.Size([6, 2])

    Another prior of u, and nothing else:

    >>> from pyro.distributions import StudentT
    >>> class HeavyTailed(SCANVAE):
    ...     def p_u(self, cells):
    ...         zero = self.y_prior.new_zeros(self.n_latent)
    ...         return StudentT(4.0, zero, zero + 1).to_event(1)
    >>> HeavyTailed(n_input=5, n_labels=2, n_latent=2).p_u(cells).base_dist.df
    tensor([4., 4.])
    """

    library_log_means: Tensor  # of a latent library
    library_log_vars: Tensor

    @validation.plain_arguments
    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        n_continuous_cov: int = 0,
        n_cats_per_cov: Sequence[int] | None = None,
        dropout_rate: float = 0.1,
        dispersion: str | Callable[[Sizes], nn.Module] = "gene",
        log_variational: bool = True,
        gene_likelihood: str | GeneLikelihood | Callable = "zinb",
        y_prior: Tensor | Sequence[float] | None = None,
        labels_groups: Sequence[int] | None = None,
        use_labels_groups: bool = False,
        classifier_parameters: Mapping[str, Any] | None = None,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        *,
        latent_distribution: str = "normal",
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_observed_lib_size: bool = True,
        library_log_means: Tensor | Sequence[float] | None = None,
        library_log_vars: Tensor | Sequence[float] | None = None,
        use_size_factor_key: bool = False,
        linear_classifier: bool = False,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        batch_representation: str = "one-hot",
        batch_embedding_kwargs: Mapping[str, Any] | None = None,
        extra_encoder_kwargs: Mapping[str, Any] | None = None,
        extra_decoder_kwargs: Mapping[str, Any] | None = None,
        label_noise: str | Callable[[LabelSizes], LabelNoise] = "none",
        n_annotators: int = 1,
        n_extra: Mapping[str, int] | None = None,
        **unknown: Any,
    ):
        super().__init__()
        validation.check_arguments(SCANVAE, unknown)
        validation.check_at_least(1, n_latent=n_latent, n_annotators=n_annotators)
        categories, self.n_extra = tuple(n_cats_per_cov or ()), arguments.checked_widths(n_extra)
        sizes = DataSizes(n_input, n_batch, n_labels, n_continuous_cov, categories)
        layers = Layers(n_hidden, n_layers, dropout_rate, use_batch_norm, use_layer_norm)
        self._set_sizes(sizes, layers)
        self.n_latent, self.deep = n_latent, deeply_inject_covariates
        self.log_variational, self.encode_covariates = log_variational, encode_covariates
        self._set_library(
            use_observed_lib_size, use_size_factor_key, library_log_means, library_log_vars
        )
        self._set_labels(y_prior, label_noise, LabelSizes(n_labels, n_annotators))
        self.state = latent_transform(latent_distribution)
        self.covariates = covariate_encoder(sizes, batch_representation, batch_embedding_kwargs)
        self._build_encoders(layers, var_activation or torch.exp, extra_encoder_kwargs)
        groups = arguments.checked_label_groups(labels_groups, use_labels_groups, n_labels)
        self.classifier = label_classifier(
            layers, n_latent, n_labels, classifier_parameters, linear_classifier, groups
        )
        self._build_decoders(layers, gene_likelihood, dispersion, extra_decoder_kwargs)

    def _set_sizes(self, sizes: DataSizes, layers: Layers) -> None:
        self.n_input, self.n_labels = sizes.n_input, sizes.n_labels
        self.n_batch, self.n_cats_per_cov = max(sizes.n_batch, 1), sizes.n_cats_per_cov
        self.n_continuous_cov, self.dropout_rate = sizes.n_continuous_cov, layers.dropout_rate
        self.n_hidden, self.n_layers = layers.n_hidden, layers.n_layers

    def _set_labels(self, y_prior: Any, noise: str | Callable, sizes: LabelSizes) -> None:
        self.register_buffer("y_prior", arguments.checked_label_prior(y_prior, sizes.n_labels))
        self.label_noise = validation.look_up(LABEL_NOISE, noise, "label_noise")(sizes)

    def _set_library(self, observed: bool, size_factor: bool, means: Any, variances: Any) -> None:
        check_one_size(size_factor, observed)
        self.use_size_factor_key = size_factor
        self.latent_library = not (observed or size_factor)
        priors = library_priors(self.latent_library, self.n_batch, means, variances)
        for name, prior in priors.items():
            self.register_buffer(name, prior)

    def _build_encoders(
        self, layers: Layers, var_activation: Callable, extra: Mapping[str, Any] | None
    ) -> None:
        given = arguments.checked_layer_arguments(extra, "extra_encoder_kwargs")
        settings = {"deep": self.deep} | given
        n_in = self.n_input
        if self.encode_covariates:
            n_in += self.covariates.n_dense
            settings["n_covariates"] = self.covariates.n_one_hot
        hidden = layers.encoder(n_in, **settings)
        self.z_encoder = encoder(hidden, self.n_latent, var_activation)
        if self.latent_library:
            hidden = layers.encoder(n_in, **(settings | {"n_layers": 1}))
            self.l_encoder = encoder(hidden, 1, var_activation)
        hidden = layers.encoder(self.n_latent, n_covariates=self.n_labels)
        self.u_encoder = encoder(hidden, self.n_latent)

    def _build_decoders(
        self,
        layers: Layers,
        gene_likelihood: str | GeneLikelihood | Callable,
        dispersion: str | Callable[[Sizes], nn.Module],
        extra: Mapping[str, Any] | None,
    ) -> None:
        self.likelihood = likelihood_of(gene_likelihood)
        make_dispersion = validation.look_up(DISPERSIONS, dispersion, "dispersion")
        hidden = layers.decoder(self.n_latent, n_covariates=self.n_labels)
        self.z_decoder = NormalNetwork(hidden, self.n_latent)
        hidden = layers.decoder(
            self.n_latent + self.covariates.n_dense,
            n_covariates=self.covariates.n_one_hot,
            deep=self.deep,
            **arguments.checked_layer_arguments(extra, "extra_decoder_kwargs"),
        )
        activation = nn.Softplus() if self.use_size_factor_key else nn.Softmax(-1)
        self.x_decoder = CountDecoder(hidden, self.n_input, activation, self.likelihood.uses_gate)
        if self.likelihood.uses_theta:
            sizes = Sizes(self.n_input, self.n_batch, self.n_labels, hidden.n_out)
            self.dispersion = make_dispersion(sizes)

    # ---- the model: p(u) p(y) p(z | u, y) p(l | s) p(x | z, l, y, s, c) ---------------------

    def model(self, cells: Cells) -> None:
        """The generative story of a minibatch, with the counts and the known labels observed."""
        announce(self, "scanvae")
        cells = sample_shared(self.p_shared(), cells)
        with self.plate(cells):
            u = pyro.sample("u", self.p_u(cells))  # N | K
            y = pyro.sample("y", self.p_y(cells))  # N | L
            pyro.factor("label", at_label(y, self.evidence(cells)))
            z = pyro.sample("z", self.p_z(u, y, cells))  # N | K
            library = self.observed_library(cells)  # N, 1
            if library is None:
                library = pyro.sample("l", self.p_l(cells))  # N | 1
            for name, (p, value) in self.observed(z, library, y, cells).items():
                pyro.sample(name, p, obs=value)  # N | G

    def p_shared(self) -> dict[str, TorchDistribution]:
        """p of what all cells share, by site; its draws come to all factors as ``cells.shared``.

        Those of the label noise, mostly none; for each site there is one in :meth:`q_shared`. Add
        to them: ``return super().p_shared() | {"pi": ...}``.
        """
        return self.label_noise.p_shared()

    def p_u(self, cells: Cells) -> TorchDistribution:
        """p(u) = N(0, I), the state of a cell within its type; batch () event (K,)."""
        zero = self.y_prior.new_zeros(self.n_latent)
        return Normal(zero, zero + 1).to_event(1)

    def p_y(self, cells: Cells) -> TorchDistribution:
        """p(y) = Categorical(pi), the cell type as one-hot; batch () event (L,)."""
        return OneHotCategorical(self.y_prior)

    def evidence(self, cells: Cells) -> Tensor:
        """log p(e | y), what is known of the label e given each label y, (..., N, L).

        Zeros where nothing is known, 0 at an exact label and a very negative number elsewhere, in
        between for sets of labels, soft labels and noise; see
        :mod:`pyro_scanvi.model.label_noise`.
        """
        return self.label_noise(cells.label_evidence(self.n_labels), cells.shared)

    def p_z(self, u: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """p(z | u, y) = N(mu_z(u, y), sigma_z^2(u, y)), cell state; batch (..., N) event (K,)."""
        return Normal(*self.z_decoder(u, y)).to_event(1)

    def p_l(self, cells: Cells) -> TorchDistribution:
        """p(l | s) = LogNormal(m_s, v_s), a latent library size; batch (N,) event (1,)."""
        mean, variance = self.library_log_means[cells.batch], self.library_log_vars[cells.batch]
        return LogNormal(mean.unsqueeze(-1), variance.sqrt().unsqueeze(-1)).to_event(1)

    def observed(
        self, z: Tensor, library: Tensor, y: Tensor, cells: Cells
    ) -> dict[str, tuple[TorchDistribution, Tensor]]:
        """What is seen of a cell, by site: its distribution and its value, (N, ...).

        The counts here; an entry more for each further modality.
        """
        return {"x": (self.p_x(z, library, y, cells), cells.x)}

    def p_x(self, z: Tensor, library: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """p(x | z, l, y, s, c), the counts of each gene; batch (..., N) event (G,)."""
        return self.likelihood.distribution(self.count_parameters(z, library, y, cells)).to_event(1)

    def count_parameters(
        self, z: Tensor, library: Tensor, y: Tensor, cells: Cells
    ) -> CountParameters:
        """rho, mu = l * rho, theta and gate logits of each gene, (..., N, G)."""
        hidden = self.decode_hidden(z, cells)
        return CountParameters(
            library,
            expression=lambda: self.decode_expression(hidden, cells),
            log_theta=lambda: self.decode_log_theta(hidden, y, cells),
            gate_logits=lambda: self.decode_gate(hidden, cells),
        )

    # Steps of the decoder, each to be changed by itself: what one of them adds the others keep.

    def decode_hidden(self, z: Tensor, cells: Cells) -> Tensor:
        """What z, batch and covariates come to before the heads, (..., N, H)."""
        features = self.covariates.dense(self.state(z), cells.batch, cells.continuous)
        return self.x_decoder(features, self.covariates.one_hot(cells.batch, cells.categorical))

    def decode_logits(self, hidden: Tensor, cells: Cells) -> Tensor:
        """Expression before its activation, linear in `hidden`, (..., N, G)."""
        return self.x_decoder.logits(hidden)

    def decode_expression(self, hidden: Tensor, cells: Cells) -> Tensor:
        """rho: proportions, or with a size factor positive numbers, (..., N, G)."""
        return self.x_decoder.activation(self.decode_logits(hidden, cells))

    def decode_log_theta(self, hidden: Tensor, y: Tensor, cells: Cells) -> Tensor:
        """Log of the inverse dispersion, broadcastable to (..., N, G)."""
        return self.dispersion(hidden, y, cells.batch)

    def decode_gate(self, hidden: Tensor, cells: Cells) -> Tensor:
        """Log odds of a structural zero, (..., N, G)."""
        return self.x_decoder.gate(hidden)

    # ---- the guide: q(z | x, s, c) q(y | z) q(u | z, y) q(l | x, s, c) -----------------------

    def guide(self, cells: Cells) -> None:
        """The variational posterior of a minibatch; labels are enumerated in parallel."""
        cells = sample_shared(self.q_shared(), cells)
        with self.plate(cells):
            z = pyro.sample("z", self.q_z(cells))  # N | K
            y = pyro.sample(  # L, 1 | L
                "y", self.q_y_given(z, cells), infer={"enumerate": "parallel"}
            )
            pyro.sample("u", self.q_u(z, y, cells))  # L, N | K
            if self.latent_library:
                pyro.sample("l", self.q_l(cells))  # N | 1

    def q_shared(self) -> dict[str, TorchDistribution]:
        """q of what all cells share, a distribution for each site of :meth:`p_shared`."""
        return self.label_noise.q_shared()

    def q_z(self, cells: Cells) -> TorchDistribution:
        """q(z | x, s, c) = N(m(x), v(x) + 1e-4), the encoder; batch (N,) event (K,)."""
        return Normal(*self.z_encoder(*self.encoder_input(cells))).to_event(1)

    def q_y(self, z: Tensor, cells: Cells) -> OneHotCategorical:
        """q(y | z) = Categorical(softmax f(z)), the classifier; batch (..., N) event (L,)."""
        return LabelCategorical(logits=self.classifier(self.state(z)))

    def q_y_given(self, z: Tensor, cells: Cells) -> OneHotCategorical:
        """q(y | z, e), proportional to q(y | z) p(e | y); batch (..., N) event (L,).

        A point where the label is known exactly, q(y | z) where nothing is.
        """
        evidence = self.evidence(cells)
        uncertain = ((evidence > LOG_IMPOSSIBLE / 2).sum(-1) != 1).sum()
        # In all processes that train alike: batch norms see each label that is enumerated.
        kind = LabelCategorical if cells.pooled(uncertain) else CertainLabel
        return kind(logits=self.q_y(z, cells).logits + evidence)

    def label_logits(self, z: Tensor, cells: Cells) -> Tensor:
        """Logits of q(y | z), (..., N, L), as the classifier gives them: not normalised."""
        if type(self).q_y is not SCANVAE.q_y:  # a factor of one's own is asked itself
            return self.q_y(z, cells).logits
        return self.classifier(self.state(z))

    def q_u(self, z: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """q(u | z, y) = N(m(z, y), v(z, y) + 1e-4); batch (..., N) event (K,)."""
        return Normal(*self.u_encoder(self.state(z), y)).to_event(1)

    def q_l(self, cells: Cells) -> TorchDistribution:
        """q(l | x, s, c) = LogNormal(m(x), v(x) + 1e-4); batch (N,) event (1,)."""
        return LogNormal(*self.l_encoder(*self.encoder_input(cells))).to_event(1)

    # ---- what model and guide share ---------------------------------------------------------

    def encoder_input(self, cells: Cells) -> tuple[Tensor, Tensor | None]:
        """What the encoders of z and l see: features (N, n), and one-hot covariates (N, m)."""
        x = cells.x.log1p() if self.log_variational else cells.x
        if not self.encode_covariates:
            return x, None
        x = self.covariates.dense(x, cells.batch, cells.continuous)
        return x, self.covariates.one_hot(cells.batch, cells.categorical)

    def latent_point(self, q_z: TorchDistribution) -> Tensor:
        """The point of q(z | x) at which cells are classified and shown, (N, K).

        Its mean; the mean of 100 draws where it has none, as a flow.
        """
        return mean_of(q_z)

    def at_shared_points(self, cells: Cells) -> Cells:
        """The cells with one value for each site that all share: the mean of its posterior."""
        shared = {name: mean_of(q) for name, q in self.q_shared().items()}
        return replace(cells, shared=shared) if shared else cells

    def observed_library(self, cells: Cells) -> Tensor | None:
        """The given size or the total count of each cell, (N, 1); None if it is latent."""
        if cells.size_factor is not None:
            return cells.size_factor
        return None if self.latent_library else cells.x.sum(-1, keepdim=True)

    @property
    def reads_label(self) -> bool:
        """Whether p(x | z, l, y, s, c) depends on the label, by its dispersion."""
        return reads_label(getattr(self, "dispersion", None))

    def one_hot_labels(self, cells: Cells) -> Tensor:
        """Known labels as one-hot, (N, L); what stands for an unknown one is not to be read."""
        return one_hot(cells.label.clamp(min=0), self.n_labels).to(self.y_prior.dtype)

    @contextmanager
    def plate(self, cells: Cells) -> Iterator[None]:
        """The plate of all cells, subsampled, each cell with its weight."""
        weight = 1.0 if cells.weight is None else cells.weight
        with (
            pyro.plate("cells", size=cells.n_obs, subsample=cells.index, dim=-1),
            poutine.scale(scale=weight),
            in_plate(self, len(cells)),
            checked_start(),
        ):
            yield

    def prior(
        self, n_cells: int, batch: int = 0, library: float | None = None
    ) -> dict[str, Tensor]:
        """The story told without data: draws of every site of the model, in eval mode.

        Parameters
        ----------
        n_cells
            Number N of cells.
        batch
            Code of their batch; other covariates are 0, and so are extra data where a factor reads
            them as given: where they are observed, they are drawn.
        library
            Size of each cell in counts; of a latent library None draws it.

        Returns
        -------
        dict
            ``u`` and ``z`` (N, K), ``y`` as one-hot (N, L), ``x`` (N, G), ``l`` (N, 1) where it is
            drawn, further observed sites, and those that all cells share.

        Raises
        ------
        InputError
            If there is no such batch, or no `library` where the model reads it from the counts.
        """
        cells = self.unseen(n_cells, batch, library)
        with torch.no_grad(), evaluated(self):
            trace = poutine.trace(poutine.uncondition(self.model)).get_trace(cells)
        parts = ("cells", "label")  # the plate, and the evidence, of which there is none
        return {name: value for name, value in samples(trace).items() if name not in parts}

    def unseen(self, n_cells: int, batch: int = 0, library: float | Tensor | None = None) -> Cells:
        """Cells of which nothing is known but where they come from; all counts are 0.

        Parameters
        ----------
        n_cells, batch
            As in :meth:`prior`.
        library
            Size in counts of all cells, or of each, (N, 1); None only where it is latent.

        Raises
        ------
        InputError
            As :meth:`prior`.
        """
        if library is None and not self.latent_library:
            raise InputError("the model reads the library; give library=, the counts of a cell")
        zeros, n_categorical = self.y_prior.new_zeros, len(self.n_cats_per_cov)
        cells = self.cells(
            zeros(n_cells, self.n_input),
            zeros(n_cells) + batch,
            cont_covs=zeros(n_cells, self.n_continuous_cov) if self.n_continuous_cov else None,
            cat_covs=zeros(n_cells, n_categorical) if n_categorical else None,
            size_factors=False,
            extra={name: zeros(n_cells, n) for name, n in self.n_extra.items()},
        )
        if library is not None:
            cells = replace(cells, size_factor=zeros(n_cells, 1) + library)
        return cells

    # ---- how it grows -----------------------------------------------------------------------

    def growth(self) -> dict[str, Rule]:
        """How parameters and buffers grow with new labels, batches and categories.

        By the name of a tensor, or of a part whose tensors grow alike. What follows from where a
        part stands is said here; a module that knows better, such as a dispersion, says so where
        it makes a tensor, as one does for a parameter of one's own:
        ``grows(self, log_pi=ByLabel(dim=0))``, see :func:`~pyro_scanvi.model.growth.grows`.
        """
        covariates, labels = ByCovariates(dim=1), ByLabel(dim=1)  # inputs of the linear layers
        return {
            "z_encoder": covariates,
            "l_encoder": covariates,
            "x_decoder": covariates,
            "u_encoder": labels,
            "z_decoder": labels,
            "classifier": ByLabel(dim=0),
            "y_prior": ByLabel(dim=0, start=label_prior),
            "library_log_means": ByBatch(dim=0, start=from_the_data),
            "library_log_vars": ByBatch(dim=0, start=from_the_data),
            **told(self),
        }


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """In eval mode; the mode that was found comes back."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def mean_of(q: TorchDistribution) -> Tensor:
    """Its mean; the mean of 100 draws where that has no closed form."""
    try:
        return q.mean
    except NotImplementedError:
        return q.rsample(torch.Size([N_DRAWS_OF_A_POINT])).mean(0)


def sample_shared(shared: Mapping[str, TorchDistribution], cells: Cells) -> Cells:
    """The cells with draws of what all of them share."""
    if not shared:
        return cells
    return replace(cells, shared={name: pyro.sample(name, p) for name, p in shared.items()})

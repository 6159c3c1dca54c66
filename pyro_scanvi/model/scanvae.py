r"""scANVI as a Pyro program: one method for each factor of the model p and of the guide q.

.. math::

    u &\sim \mathcal N(0, I) && \text{state within a cell type} \\
    y &\sim \mathrm{Categorical}(\pi) && \text{cell type} \\
    z \mid u, y &\sim \mathcal N(\mu_z(u, y), \sigma_z^2(u, y)) && \text{cell state} \\
    l \mid s &\sim \mathrm{LogNormal}(m_s, v_s) && \text{library size, unless it is observed} \\
    x_g \mid z, l, s, c &\sim \mathrm{ZINB}(l\,\rho_g(z, s, c),\ \theta_g,\ h_g(z, s, c))
        && \text{counts}

with the guide :math:`q(z \mid x, s, c)\, q(y \mid z)\, q(u \mid z, y)\, q(l \mid x, s, c)`.
Batch is s, further covariates are c. Xu et al. (2021), Mol Syst Biol 17:e9620; Kingma et al.
(2014), arXiv 1406.5298 (M1+M2); Lopez et al. (2018), Nat Methods 15:1053 (scVI).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import LogNormal, Normal, OneHotCategorical, TorchDistribution
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.distributions import LogNormal as TorchLogNormal
from torch.nn.functional import one_hot

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.growth import (
    ByBatch,
    ByCovariates,
    ByLabel,
    Growth,
    from_the_data,
    label_prior,
    told,
)
from pyro_scanvi.model.likelihoods import (
    DISPERSIONS,
    GENE_LIKELIHOODS,
    CountParameters,
    GeneLabelDispersion,
    GeneLikelihood,
    Sizes,
)
from pyro_scanvi.model.networks import (
    Classifier,
    CountDecoder,
    CovariateEncoder,
    GroupedClassifier,
    HiddenLayers,
    NormalNetwork,
)

if TYPE_CHECKING:
    from pyro_scanvi.model.scvi_interface import LossRecord

ENCODER_VAR_EPS = 1e-4
EMBEDDING_DIM = 5
NORM_PLACES = {
    "encoder": (True, False),
    "decoder": (False, True),
    "both": (True, True),
    "none": (False, False),
}
LATENT_TRANSFORMS = {"normal": nn.Identity, "ln": lambda: nn.Softmax(-1)}
BATCH_REPRESENTATIONS = {"one-hot": False, "embedding": True}


class SCANVAE(nn.Module):
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
    extra_encoder_kwargs, extra_decoder_kwargs
        ``activation`` and ``bias`` of the hidden layers of the encoders of z and l, and of the
        decoder of x.

    Raises
    ------
    TypeError
        For an unknown argument; the error names the nearest.
    ValueError
        For a wrong size, value or combination.
    """

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
        **unknown: Any,
    ):
        super().__init__()
        validation.check_arguments(SCANVAE, unknown)
        validation.check_rate(dropout_rate=dropout_rate)
        self._set_data_sizes(n_input, n_batch, n_labels, n_continuous_cov, n_cats_per_cov)
        self._set_network_sizes(n_hidden, n_latent, n_layers)
        self.dropout_rate, self.deep = dropout_rate, deeply_inject_covariates
        self.log_variational, self.encode_covariates = log_variational, encode_covariates
        self._norms = _norms(use_batch_norm, use_layer_norm)
        self._set_library(
            use_observed_lib_size, use_size_factor_key, library_log_means, library_log_vars
        )
        self.register_buffer("y_prior", validation.checked_label_prior(y_prior, n_labels))
        self.state = validation.look_up(
            LATENT_TRANSFORMS, latent_distribution, "latent_distribution"
        )()
        self._build_covariates(batch_representation, batch_embedding_kwargs)
        self._build_encoders(var_activation or torch.exp, extra_encoder_kwargs)
        self._build_classifier(
            classifier_parameters,
            linear_classifier,
            validation.checked_label_groups(labels_groups, use_labels_groups, n_labels),
        )
        self._build_decoders(gene_likelihood, dispersion, extra_decoder_kwargs)

    # ---- the model: p(u) p(y) p(z | u, y) p(l | s) p(x | z, l, y, s, c) ---------------------

    def model(self, cells: Cells) -> None:
        """The generative story of a minibatch, with the counts and the known labels observed."""
        self._announce_parameters()
        with self.plate(cells):
            u = pyro.sample("u", self.p_u())  # N | K
            y = pyro.sample(  # N | L
                "y", self.p_y(), obs=self.one_hot_labels(cells), obs_mask=cells.labelled
            )
            z = pyro.sample("z", self.p_z(u, y))  # N | K
            library = self.observed_library(cells)  # N, 1
            if library is None:
                library = pyro.sample("l", self.p_l(cells))  # N | 1
            pyro.sample("x", self.p_x(z, library, y, cells), obs=cells.x)  # N | G

    def p_u(self) -> TorchDistribution:
        """p(u) = N(0, I), the state of a cell within its type; batch () event (K,)."""
        zero = self.y_prior.new_zeros(self.n_latent)
        return Normal(zero, zero + 1).to_event(1)

    def p_y(self) -> TorchDistribution:
        """p(y) = Categorical(pi), the cell type as one-hot; batch () event (L,)."""
        return OneHotCategorical(self.y_prior)

    def p_z(self, u: Tensor, y: Tensor) -> TorchDistribution:
        """p(z | u, y) = N(mu_z(u, y), sigma_z^2(u, y)), cell state; batch (..., N) event (K,)."""
        return Normal(*self.z_decoder(u, y)).to_event(1)

    def p_l(self, cells: Cells) -> TorchDistribution:
        """p(l | s) = LogNormal(m_s, v_s), a latent library size; batch (N,) event (1,)."""
        mean, variance = self.library_log_means[cells.batch], self.library_log_vars[cells.batch]
        return LogNormal(mean.unsqueeze(-1), variance.sqrt().unsqueeze(-1)).to_event(1)

    def p_x(self, z: Tensor, library: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """p(x | z, l, y, s, c), the counts of each gene; batch (..., N) event (G,)."""
        return self.likelihood.distribution(self.count_parameters(z, library, y, cells)).to_event(1)

    def count_parameters(
        self, z: Tensor, library: Tensor, y: Tensor, cells: Cells
    ) -> CountParameters:
        """rho, mu = l * rho, theta and gate logits of each gene, (..., N, G)."""
        features = self.covariates.dense(self.state(z), cells.batch, cells.continuous)
        one_hots = self.covariates.one_hot(cells.batch, cells.categorical)
        hidden = self.x_decoder(features, one_hots)

        def log_theta() -> Tensor:
            return self.dispersion(hidden, y, cells.batch)

        return CountParameters(self.x_decoder, hidden, library, log_theta)

    # ---- the guide: q(z | x, s, c) q(y | z) q(u | z, y) q(l | x, s, c) -----------------------

    def guide(self, cells: Cells) -> None:
        """The variational posterior of a minibatch; unknown labels are enumerated in parallel."""
        labelled = cells.labelled
        with self.plate(cells):
            z = pyro.sample("z", self.q_z(cells))  # N | K
            # Without the mask, labelled cells would gain an entropy term.
            with poutine.mask(mask=~labelled):
                y = pyro.sample("y_unobserved", self.q_y(z), infer={"enumerate": "parallel"})
            y = torch.where(labelled.unsqueeze(-1), self.one_hot_labels(cells), y)  # L, N, L
            pyro.sample("u", self.q_u(z, y))  # L, N | K
            if self.latent_library:
                pyro.sample("l", self.q_l(cells))  # N | 1

    def q_z(self, cells: Cells) -> TorchDistribution:
        """q(z | x, s, c) = N(m(x), v(x) + 1e-4), the encoder; batch (N,) event (K,)."""
        return Normal(*self.z_encoder(*self._encoder_input(cells))).to_event(1)

    def q_y(self, z: Tensor) -> TorchDistribution:
        """q(y | z) = Categorical(softmax f(z)), the classifier; batch (..., N) event (L,)."""
        return OneHotCategorical(logits=self.classifier(self.state(z)))

    def q_u(self, z: Tensor, y: Tensor) -> TorchDistribution:
        """q(u | z, y) = N(m(z, y), v(z, y) + 1e-4); batch (..., N) event (K,)."""
        return Normal(*self.u_encoder(self.state(z), y)).to_event(1)

    def q_l(self, cells: Cells) -> TorchDistribution:
        """q(l | x, s, c) = LogNormal(m(x), v(x) + 1e-4); batch (N,) event (1,)."""
        return LogNormal(*self.l_encoder(*self._encoder_input(cells))).to_event(1)

    # ---- what model and guide share ---------------------------------------------------------

    def observed_library(self, cells: Cells) -> Tensor | None:
        """The given size factor or the total count of each cell, (N, 1); None if it is latent."""
        if self.use_size_factor_key:
            return cells.size_factor
        return None if self.latent_library else cells.x.sum(-1, keepdim=True)

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
        ):
            yield

    def _encoder_input(self, cells: Cells) -> tuple[Tensor, Tensor | None]:
        x = cells.x.log1p() if self.log_variational else cells.x
        if not self.encode_covariates:
            return x, None
        x = self.covariates.dense(x, cells.batch, cells.continuous)
        return x, self.covariates.one_hot(cells.batch, cells.categorical)

    def _announce_parameters(self) -> None:
        """Show Pyro the module's own parameters as `param` sites.

        SVI collects and steps what it is shown; nothing goes into the global store.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                shown = parameter.detach()
                shown.unconstrained = lambda parameter=parameter: parameter
                effectful(lambda shown=shown: shown, type="param")(name=f"scanvae.{name}")

    def growth(self) -> dict[str, Growth]:
        """How parameters and buffers grow with new labels, batches and categories.

        By the name of a tensor, or of a part whose tensors grow alike. What follows from where a
        part stands is said here; a module that knows better, such as a dispersion, has a method
        ``growth()`` of its own. For a parameter of one's own add to it:
        ``return super().growth() | {"log_pi": ByLabel(dim=0)}``.
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

    # ---- the interface of scvi-tools' SCANVAE -----------------------------------------------

    def classify(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        use_posterior_mean: bool = True,
    ) -> Tensor:
        """Logits of q(y | z) at the mean of q(z | x), or at a sample of it, (N, L).

        Their softmax are the probabilities, with groups of labels too.

        Parameters
        ----------
        x
            Counts, (N, G).
        batch_index
            Batch codes, (N, 1) or (N,); may be left out unless the encoder reads them.
        cont_covs, cat_covs
            Values (N, C) and codes (N, D) of further covariates; likewise.
        use_posterior_mean
            Classify the mean, not a sample.

        Raises
        ------
        ValueError
            For wrong sizes, codes out of range, or covariates other than announced.
        """
        q_z = self.q_z(self._encoder_cells(x, batch_index, cont_covs, cat_covs))
        z = q_z.mean if use_posterior_mean else q_z.rsample()
        if type(self).q_y is not SCANVAE.q_y:  # a factor of one's own is asked itself
            return self.q_y(z).logits
        return self.classifier(self.state(z))

    def inference(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        n_samples: int = 1,
    ) -> dict[str, Any]:
        """Samples of q(z | x, s, c) and of log l; arguments as in :meth:`classify`.

        Returns
        -------
        dict
            ``z`` (N, K), before the softmax of ``latent_distribution="ln"``; ``qz``, its Normal;
            ``library``, the log of the total count or of a sample of l, (N, 1); ``ql``, the Normal
            of log l, None where the library is observed. With more than one sample, z and library
            have ``n_samples`` in front.

        Raises
        ------
        ValueError
            As :meth:`classify`.
        """
        validation.check_at_least(1, n_samples=n_samples)
        cells = self._encoder_cells(x, batch_index, cont_covs, cat_covs)
        q_z, q_l = self.q_z(cells), self.q_l(cells) if self.latent_library else None
        many = (n_samples,) if n_samples > 1 else ()
        if q_l is None:
            library = cells.x.sum(-1, keepdim=True).log().expand(*many, -1, -1)
        else:
            library = q_l.rsample(many).log()
        ql = None if q_l is None else _of_log(_dimensionwise(q_l))
        return {"z": q_z.rsample(many), "qz": _dimensionwise(q_z), "ql": ql, "library": library}

    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        y: Tensor | None = None,
        transform_batch: int | None = None,
    ) -> dict[str, Any]:
        """Distribution of the counts given z and l.

        Parameters
        ----------
        z, library
            As from :meth:`inference`, (..., N, K) and (..., N, 1); library is a logarithm.
        batch_index, cont_covs, cat_covs
            Batch codes, (N, 1) or (N,), and further covariates, (N, C) and (N, D).
        size_factor
            Log of the given size factors, (N, 1); read instead of `library` where the model was
            built with ``use_size_factor_key``.
        y
            Label codes, (N, 1) or (N,); read where the dispersion belongs to a label.
        transform_batch
            Decode every cell as if it were of this batch.

        Returns
        -------
        dict
            ``px``, of batch shape (..., N, G); ``pl``, the Normal of log l, None where the library
            is observed; ``pz``, N(0, I), which is scVI's prior and kept for the interface:
            that of this model is :meth:`p_z`.

        Raises
        ------
        ValueError
            For wrong sizes, codes out of range, covariates other than announced, a size factor or
            labels that are needed and not given.
        """
        validation.check_latents(z, library, self.n_latent)
        covariates = (cont_covs, cat_covs)
        cells = self._decoder_cells(z, batch_index, y, *covariates, log_size_factor=size_factor)
        if transform_batch is not None:
            cells = replace(cells, batch=torch.full_like(cells.batch, transform_batch))
            validation.check_codes("transform_batch", cells.batch, len(cells), self.n_batch)
        size = cells.size_factor if self.use_size_factor_key else library.exp()
        px = self.p_x(z, size, self.one_hot_labels(cells), cells)
        pl = _of_log(_dimensionwise(self.p_l(cells))) if self.latent_library else None
        pz = Normal(torch.zeros_like(z), torch.ones_like(z))
        return {"px": _dimensionwise(px), "pl": pl, "pz": pz}

    def loss(
        self,
        tensors: Mapping[str, Tensor],
        inference_outputs: Mapping[str, Any],
        generative_outputs: Mapping[str, Any] | None = None,
        feed_labels: bool = False,
        kl_weight: float = 1.0,
        labelled_tensors: Mapping[str, Tensor] | None = None,
        classification_ratio: float | None = None,
    ) -> "LossRecord":
        """Training objective at given samples of z and l, which :meth:`guide` then replays.

        Parameters
        ----------
        tensors
            A minibatch by scvi-tools' names: ``X``, ``batch``, ``labels`` (any code outside
            0..L-1 is unlabelled), ``extra_continuous_covs``, ``extra_categorical_covs``,
            ``size_factor``.
        inference_outputs
            What :meth:`inference` made of it.
        generative_outputs
            Part of the interface, not read: :meth:`model` computes p(x | z, l) itself.
        feed_labels, kl_weight
            As in :class:`~pyro_scanvi.SemiSupervisedELBO`.
        labelled_tensors
            A minibatch for the classification term; without it there is none.
        classification_ratio
            Weight of that term; None is the default of the objective, 50.

        Returns
        -------
        LossRecord
            The loss, with a gradient, and its parts.

        Raises
        ------
        ValueError
            If tensors, z or library do not fit the model, or nothing is labelled in
            `labelled_tensors`.
        """
        from pyro_scanvi.model import scvi_interface

        return scvi_interface.loss(
            self,
            tensors,
            inference_outputs,
            feed_labels,
            kl_weight,
            labelled_tensors,
            classification_ratio,
        )

    def sample(self, tensors: Mapping[str, Tensor], n_samples: int = 1) -> Tensor:
        """Counts from the posterior predictive distribution p(x' | x), on the CPU.

        Parameters
        ----------
        tensors
            As in :meth:`loss`.
        n_samples
            Draws for each cell.

        Returns
        -------
        Tensor
            (N, G); with more than one sample (N, G, n_samples).

        Raises
        ------
        ValueError
            If the tensors do not fit the model.
        """
        from pyro_scanvi.model import scvi_interface

        return scvi_interface.sample(self, tensors, n_samples)

    @classmethod
    def from_scvi_tools(cls, state_dict: Mapping[str, Tensor], **kwargs: Any) -> "SCANVAE":
        """A model with the weights of scvi-tools' SCANVAE, in eval mode.

        Versions before 1.1 end their classifier in a softmax (``logits=False``): their
        probabilities are the softmax of our logits.

        Parameters
        ----------
        state_dict
            ``module.state_dict()`` of a SCANVAE of scvi-tools.
        **kwargs
            The arguments that it was made with; the priors of labels and library come from
            `state_dict`.

        Raises
        ------
        ValueError
            If keys are missing, unexpected or of another shape; it counts and lists them.
        TypeError
            For an unknown argument.
        """
        from pyro_scanvi.model import scvi_interface

        return scvi_interface.load_scvi_tools(cls, state_dict, **kwargs)

    def to_scvi_tools(self) -> dict[str, Tensor]:
        """State dict for a SCANVAE of scvi-tools made with the same arguments.

        Heads that scvi-tools owns and does not use, and we do not own, are filled with zeros.

        Raises
        ------
        ValueError
            If scvi-tools has no place for a part of this model.
        """
        from pyro_scanvi.model import scvi_interface

        return scvi_interface.to_scvi_tools(self)

    def cells(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        **read: bool,
    ) -> Cells:
        """Cells for :meth:`model` and :meth:`guide`, after a check that they fit.

        Parameters
        ----------
        x
            Counts, (N, G).
        batch_index, y
            Codes of batch and label, (N, 1) or (N,); any label outside 0..L-1 is unlabelled.
        cont_covs, cat_covs, size_factor
            Further covariates, (N, C) and (N, D), and size factors, (N, 1).
        **read
            ``covariates=False`` or ``size_factors=False`` if they may be missing.

        Raises
        ------
        ValueError
            For wrong sizes, codes out of range, or covariates other than announced.
        """
        dtype = self.y_prior.dtype
        cells = Cells.from_counts(
            x.to(dtype),
            None if batch_index is None else validation.flat("batch_index", batch_index),
            None if y is None else validation.known_labels("labels", y, self.n_labels),
            continuous=None if cont_covs is None else cont_covs.to(dtype),
            categorical=None if cat_covs is None else validation.whole("cat_covs", cat_covs),
            size_factor=None if size_factor is None else size_factor.to(dtype),
        )
        validation.check_cells(self, cells, batch_given=batch_index is not None, **read)
        return cells

    def _encoder_cells(self, x: Tensor, batch_index: Tensor | None, *covariates: Any) -> Cells:
        read = {"covariates": self.encode_covariates, "size_factors": False}
        return self.cells(x, batch_index, None, *covariates, **read)

    def _decoder_cells(
        self,
        z: Tensor,
        batch_index: Tensor,
        y: Tensor | None,
        *covariates: Any,
        log_size_factor: Tensor | None,
    ) -> Cells:
        # The factors of x read no counts; zeros that take no memory stand for them.
        x = z.new_zeros(1, 1).expand(z.shape[-2], self.n_input)
        size_factor = None if log_size_factor is None else log_size_factor.exp()
        cells = self.cells(x, batch_index, y, *covariates, size_factor)
        needed = isinstance(getattr(self, "dispersion", None), GeneLabelDispersion)
        if needed and not cells.labelled.all():
            raise ValueError(
                f"{(~cells.labelled).sum()} cells have no label in y, but the dispersion belongs "
                "to a label; give the label of each cell"
            )
        return cells

    # ---- construction -----------------------------------------------------------------------

    def _set_data_sizes(
        self,
        n_input: int,
        n_batch: int,
        n_labels: int,
        n_continuous_cov: int,
        n_cats_per_cov: Sequence[int] | None,
    ) -> None:
        categories = tuple(n_cats_per_cov or ())
        validation.check_at_least(1, n_input=n_input)
        validation.check_at_least(0, n_batch=n_batch, n_continuous_cov=n_continuous_cov)
        validation.check_at_least(2, n_labels=n_labels)
        validation.check_at_least(
            1, **{f"n_cats_per_cov[{i}]": n for i, n in enumerate(categories)}
        )
        self.n_input, self.n_batch, self.n_labels = n_input, max(n_batch, 1), n_labels
        self.n_continuous_cov, self.n_cats_per_cov = n_continuous_cov, categories

    def _set_network_sizes(self, n_hidden: int, n_latent: int, n_layers: int) -> None:
        validation.check_at_least(1, n_hidden=n_hidden, n_latent=n_latent)
        validation.check_at_least(0, n_layers=n_layers)
        self.n_hidden, self.n_latent, self.n_layers = n_hidden, n_latent, n_layers

    def _set_library(self, observed: bool, size_factor: bool, means: Any, variances: Any) -> None:
        if size_factor and not observed:
            raise ValueError(
                "use_size_factor_key=True gives the size of each cell, use_observed_lib_size=False "
                "infers it; choose one"
            )
        self.use_size_factor_key = size_factor
        self.latent_library = not (observed or size_factor)
        given = {"library_log_means": means, "library_log_vars": variances}
        if not self.latent_library:
            validation.check_absent(
                given, "a latent library; set use_observed_lib_size=False with it"
            )
            return
        for name, values in given.items():
            positive = name == "library_log_vars"
            prior = validation.checked_library_prior(values, self.n_batch, name, positive)
            self.register_buffer(name, prior)

    def _build_covariates(self, representation: str, kwargs: Mapping[str, Any] | None) -> None:
        embedded = validation.look_up(BATCH_REPRESENTATIONS, representation, "batch_representation")
        kwargs = dict(kwargs or {})
        validation.check_known(kwargs, ["embedding_dim"], "an argument of the batch embedding")
        validation.check_at_least(1, **kwargs)
        if kwargs and not embedded:
            raise ValueError("batch_embedding_kwargs needs batch_representation='embedding'")
        dim = kwargs.get("embedding_dim", EMBEDDING_DIM) if embedded else None
        self.covariates = CovariateEncoder(
            self.n_batch, self.n_cats_per_cov, self.n_continuous_cov, dim
        )

    def _hidden(self, n_in: int, encoder: bool, **changes: Any) -> HiddenLayers:
        """Hidden layers with the widths and norms of this model."""
        batch_norm, layer_norm = self._norms["encoder" if encoder else "decoder"]
        settings = {
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "dropout_rate": self.dropout_rate if encoder else 0.0,
            "batch_norm": batch_norm,
            "layer_norm": layer_norm,
        }
        return HiddenLayers(n_in, **(settings | changes))

    def _build_encoders(self, var_activation: Callable, extra: Mapping[str, Any] | None) -> None:
        n_in, covariates = self.n_input, {"deep": self.deep}
        if self.encode_covariates:
            n_in += self.covariates.n_dense
            covariates["n_covariates"] = self.covariates.n_one_hot
        covariates |= validation.checked_layer_arguments(extra, "extra_encoder_kwargs")
        variance = {"var_activation": var_activation, "var_eps": ENCODER_VAR_EPS}
        hidden = self._hidden(n_in, encoder=True, **covariates)
        self.z_encoder = NormalNetwork(hidden, self.n_latent, **variance)
        if self.latent_library:
            hidden = self._hidden(n_in, encoder=True, **(covariates | {"n_layers": 1}))
            self.l_encoder = NormalNetwork(hidden, 1, **variance)
        hidden = self._hidden(self.n_latent, encoder=True, n_covariates=self.n_labels)
        self.u_encoder = NormalNetwork(hidden, self.n_latent, var_eps=ENCODER_VAR_EPS)

    def _build_classifier(
        self, changes: Mapping[str, Any] | None, linear: bool, groups: Tensor | None
    ) -> None:
        settings = {"n_layers": 0} if linear else {}
        settings |= validation.checked_classifier_parameters(changes)
        hidden = self._hidden(self.n_latent, encoder=True, **settings)
        self.classifier = Classifier(hidden, self.n_labels)
        if groups is not None:
            hidden = self._hidden(self.n_latent, encoder=True, **settings)
            group_classifier = Classifier(hidden, int(groups.max()) + 1)
            self.classifier = GroupedClassifier(self.classifier, group_classifier, groups)

    def _build_decoders(
        self,
        gene_likelihood: str | GeneLikelihood | Callable,
        dispersion: str | Callable[[Sizes], nn.Module],
        extra: Mapping[str, Any] | None,
    ) -> None:
        likelihood = validation.look_up(GENE_LIKELIHOODS, gene_likelihood, "gene_likelihood")
        if not isinstance(likelihood, GeneLikelihood):
            likelihood = GeneLikelihood(likelihood)
        make_dispersion = validation.look_up(DISPERSIONS, dispersion, "dispersion")
        self.likelihood = likelihood
        hidden = self._hidden(self.n_latent, encoder=False, n_covariates=self.n_labels)
        self.z_decoder = NormalNetwork(hidden, self.n_latent)
        hidden = self._hidden(
            self.n_latent + self.covariates.n_dense,
            encoder=False,
            n_covariates=self.covariates.n_one_hot,
            deep=self.deep,
            **validation.checked_layer_arguments(extra, "extra_decoder_kwargs"),
        )
        activation = nn.Softplus() if self.use_size_factor_key else nn.Softmax(-1)
        self.x_decoder = CountDecoder(hidden, self.n_input, activation, gate=likelihood.uses_gate)
        if likelihood.uses_theta:
            sizes = Sizes(self.n_input, self.n_batch, self.n_labels, hidden.n_out)
            self.dispersion = make_dispersion(sizes)


def _norms(use_batch_norm: str, use_layer_norm: str) -> dict[str, tuple[bool, bool]]:
    """Whether encoders and decoders use (batch norm, layer norm)."""
    batch = validation.look_up(NORM_PLACES, use_batch_norm, "use_batch_norm")
    layer = validation.look_up(NORM_PLACES, use_layer_norm, "use_layer_norm")
    return {"encoder": (batch[0], layer[0]), "decoder": (batch[1], layer[1])}


def _dimensionwise(distribution: Distribution) -> Distribution:
    """The distribution of each dimension, where they are independent."""
    return distribution.base_dist if isinstance(distribution, Independent) else distribution


def _of_log(distribution: Distribution) -> Distribution:
    """The Normal of the logarithm, where the distribution is a LogNormal."""
    return distribution.base_dist if isinstance(distribution, TorchLogNormal) else distribution

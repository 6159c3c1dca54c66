"""scvi-tools' piecewise interface of a SCANVAE: classify, inference, generative, loss, weights.

All of it asks the factors, the model and the guide of the program, which know nothing of it.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from pyro.distributions import Independent, LogNormal, Normal, OneHotCategorical, TorchDistribution
from pyro.infer import Predictive
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Independent as TorchIndependent
from torch.distributions import LogNormal as TorchLogNormal
from torch.distributions import Normal as TorchNormal

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model import fitting
from pyro_scanvi.model.objective import SemiSupervisedELBO, classification_cost
from pyro_scanvi.scvi_tools.arguments import scanvae_arguments
from pyro_scanvi.scvi_tools.weights import our_state, scvi_state
from pyro_scanvi.validation import InputError


@dataclass(frozen=True)
class LossRecord:
    """A loss in nats per cell and its parts, divided as scvi-tools divides them.

    ``loss = mean(reconstruction_loss + w * kl_local) + kl_global / N + r * classification_loss``
    with KL weight w and classification ratio r.

    Attributes
    ----------
    loss
        What is minimised, a scalar; the only part with a gradient, but for classification_loss.
    reconstruction_loss
        -log p(x | z, l) + log q(z | x) - E_q(y | z) log p(z | u, y) of each cell, (N,).
    kl_local
        KL of u, of y and of l of each cell, unweighted, (N,).
    kl_global
        KL of sites outside the plate of cells, a scalar.
    classification_loss
        Mean cross-entropy over the labelled cells, a scalar; 0 without ``labelled_tensors``.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    kl_local: Tensor
    kl_global: Tensor
    classification_loss: Tensor


class PiecewiseInterface(nn.Module):
    """The methods of scvi-tools' SCANVAE, over a program's factors, model and guide."""

    n_input: int
    n_batch: int
    n_labels: int
    n_latent: int
    n_continuous_cov: int
    n_cats_per_cov: tuple[int, ...]
    use_size_factor_key: bool
    n_extra: dict[str, int]
    encode_covariates: bool
    latent_library: bool
    y_prior: Tensor

    @abstractmethod
    def model(self, cells: Cells) -> None:
        """The generative story."""

    @abstractmethod
    def guide(self, cells: Cells) -> None:
        """The variational posterior."""

    @abstractmethod
    def p_l(self, cells: Cells) -> TorchDistribution:
        """p(l | s)."""

    @abstractmethod
    def p_x(self, z: Tensor, library: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """p(x | z, l, y, s, c)."""

    @abstractmethod
    def q_z(self, cells: Cells) -> TorchDistribution:
        """q(z | x, s, c)."""

    @abstractmethod
    def q_y(self, z: Tensor, cells: Cells) -> OneHotCategorical:
        """q(y | z)."""

    @abstractmethod
    def q_l(self, cells: Cells) -> TorchDistribution:
        """q(l | x, s, c)."""

    @abstractmethod
    def label_logits(self, z: Tensor, cells: Cells) -> Tensor:
        """Logits of q(y | z)."""

    @abstractmethod
    def latent_point(self, q_z: TorchDistribution) -> Tensor:
        """The point of q(z | x) that is classified."""

    @abstractmethod
    def evidence(self, cells: Cells) -> Tensor:
        """What is known of the label, given each label."""

    @abstractmethod
    def at_shared_points(self, cells: Cells) -> Cells:
        """The cells with a value for each site that all share."""

    @abstractmethod
    def one_hot_labels(self, cells: Cells) -> Tensor:
        """Known labels as one-hot."""

    @property
    @abstractmethod
    def reads_label(self) -> bool:
        """Whether p(x | ...) reads the label."""

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
        InputError
            For wrong sizes, codes out of range, or covariates other than announced.
        """
        cells = self._encoder_cells(x, batch_index, cont_covs, cat_covs)
        cells = self.at_shared_points(cells)
        q_z = self.q_z(cells)
        z = self.latent_point(q_z) if use_posterior_mean else q_z.rsample()
        return self.label_logits(z, cells)

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
        InputError
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
            that of this model is :meth:`~pyro_scanvi.SCANVAE.p_z`.

        Raises
        ------
        InputError
            For wrong sizes, codes out of range, covariates other than announced, a size factor or
            labels that are needed and not given.
        """
        fitting.check_latents(z, library, self.n_latent)
        cells = self._decoder_cells(z, batch_index, y, cont_covs, cat_covs, size_factor)
        if transform_batch is not None:
            cells = replace(cells, batch=torch.full_like(cells.batch, transform_batch))
            fitting.check_codes("transform_batch", cells.batch, len(cells), self.n_batch)
        size = library.exp() if cells.size_factor is None else cells.size_factor
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
    ) -> LossRecord:
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
        InputError
            If tensors, z or library do not fit the model, or nothing is labelled in
            `labelled_tensors`.
        """
        cells = self.cells_from_tensors(tensors)
        objective = SemiSupervisedELBO(
            self.q_y, feed_labels=feed_labels, kl_weight=kl_weight, point=self.latent_point
        )
        if classification_ratio is None:
            classification_ratio = objective.classification_ratio
        objective.classification_ratio = 0.0  # the term comes from labelled_tensors, or not at all
        guide = self._given_latents(cells, inference_outputs)(self.guide)
        parts = objective.parts(self.model, guide, cells)
        kl = dict(parts.kl)
        kl_z = kl.pop("z")
        wrong = parts.loss.new_zeros(())
        if labelled_tensors is not None:
            wrong = self._classification_loss(self.cells_from_tensors(labelled_tensors))
        return LossRecord(
            loss=parts.loss + classification_ratio * wrong,
            reconstruction_loss=parts.reconstruction + kl_z,
            kl_local=sum(kl.values(), parts.loss.new_zeros(())),
            kl_global=parts.kl_global,
            classification_loss=wrong,
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
        InputError
            If the tensors do not fit the model.
        """
        validation.check_at_least(1, n_samples=n_samples)
        predictive = Predictive(
            _Unobserved("x")(self.model),
            guide=self.guide,
            num_samples=n_samples,
            return_sites=["x"],
            parallel=True,
        )
        counts = predictive(self.cells_from_tensors(tensors))["x"].cpu()  # S, N, G
        return counts[0] if n_samples == 1 else counts.permute(1, 2, 0)

    @classmethod
    def from_scvi_tools(cls, state_dict: Mapping[str, Tensor], **kwargs: Any) -> Self:
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
        InputError
            If keys are missing, unexpected or of another shape; it counts and lists them.
        TypeError
            For an unknown argument.
        """
        vae = cls(**scanvae_arguments(kwargs, state_dict))
        vae.load_state_dict(our_state(vae.state_dict(), state_dict))
        return vae.eval()

    def to_scvi_tools(self) -> dict[str, Tensor]:
        """State dict for a SCANVAE of scvi-tools made with the same arguments.

        Heads that scvi-tools owns and does not use, and we do not own, are filled with zeros.

        Raises
        ------
        InputError
            If scvi-tools has no place for a part of this model.
        """
        state = scvi_state(self.state_dict())
        if self.reads_label:
            raise InputError(
                "the dispersion belongs to a label; SCANVAE of scvi-tools cannot hold that. (If it "
                "is one of your own that does not, say so: reads_label = False)"
            )
        return state

    def cells(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        *,
        covariates: bool = True,
        size_factors: bool = True,
        extra: Mapping[str, Tensor] | None = None,
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
        covariates, size_factors
            False if they may be missing; batches go with the covariates.
        extra
            Extra data by name, (N, D) each; NaN where a cell was not measured.

        Raises
        ------
        InputError
            For wrong sizes, codes out of range, or covariates other than announced.
        """
        dtype = self.y_prior.dtype
        cells = Cells.from_counts(
            x.to(dtype),
            None if batch_index is None else fitting.flat("batch_index", batch_index),
            None if y is None else fitting.known_labels("labels", y, self.n_labels),
            continuous=None if cont_covs is None else cont_covs.to(dtype),
            categorical=None if cat_covs is None else fitting.whole("cat_covs", cat_covs),
            size_factor=None if size_factor is None else size_factor.to(dtype),
            extra={name: values.to(dtype) for name, values in (extra or {}).items()},
        )
        given = batch_index is not None
        fitting.check_cells(self, cells, given, covariates, size_factors)
        return cells

    def cells_from_tensors(self, tensors: Mapping[str, Tensor]) -> Cells:
        """A minibatch from scvi-tools' names, after a check that it fits.

        Parameters
        ----------
        tensors
            ``X`` (N, G), ``batch`` (N, 1), ``labels`` (N, 1), any code outside 0..L-1 being
            unlabelled, ``extra_continuous_covs`` (N, C), ``extra_categorical_covs`` (N, D),
            ``size_factor`` (N, 1); and extra data by their names in ``n_extra``.

        Raises
        ------
        InputError
            If ``X`` is missing, or anything does not fit the model.
        """
        if "X" not in tensors:
            raise InputError(
                f"tensors hold {', '.join(tensors) or 'nothing'}; expected X, the counts"
            )
        return self.cells(
            tensors["X"],
            tensors.get("batch"),
            tensors.get("labels"),
            cont_covs=tensors.get("extra_continuous_covs"),
            cat_covs=tensors.get("extra_categorical_covs"),
            size_factor=tensors.get("size_factor"),
            extra={name: tensors[name] for name in self.n_extra if name in tensors},
        )

    def _encoder_cells(
        self,
        x: Tensor,
        batch_index: Tensor | None,
        cont_covs: Tensor | None,
        cat_covs: Tensor | None,
    ) -> Cells:
        return self.cells(
            x,
            batch_index,
            cont_covs=cont_covs,
            cat_covs=cat_covs,
            covariates=self.encode_covariates,
            size_factors=False,
        )

    def _decoder_cells(
        self,
        z: Tensor,
        batch_index: Tensor,
        y: Tensor | None,
        cont_covs: Tensor | None,
        cat_covs: Tensor | None,
        log_size_factor: Tensor | None,
    ) -> Cells:
        # The factors of x read no counts; zeros that take no memory stand for them.
        x = z.new_zeros(1, 1).expand(z.shape[-2], self.n_input)
        size_factor = None if log_size_factor is None else log_size_factor.exp()
        cells = self.cells(x, batch_index, y, cont_covs, cat_covs, size_factor)
        if self.reads_label and not cells.labelled.all():
            raise InputError(
                f"{(~cells.labelled).sum()} cells have no label in y, but the dispersion belongs "
                "to a label; give the label of each cell"
            )
        return self.at_shared_points(cells)

    def _given_latents(self, cells: Cells, outputs: Mapping[str, Any]) -> "_Given":
        """z, and l where it is latent, with their posteriors."""
        missing = [name for name in ("z", "library") if name not in outputs]
        if missing:
            raise InputError(
                f"inference_outputs lack {' and '.join(missing)}; see SCANVAE.inference"
            )
        fitting.check_shape("z", outputs["z"], (len(cells), self.n_latent))
        fitting.check_shape("library", outputs["library"], (len(cells), 1))
        sites = {"z": (outputs["z"], _joint(outputs.get("qz")))}
        if self.latent_library:
            sites["l"] = (outputs["library"].exp(), _joint(_of_exp(outputs.get("ql"))))
        return _Given(sites)

    def _classification_loss(self, cells: Cells) -> Tensor:
        if not cells.labelled.any():
            raise InputError(
                f"none of the {len(cells)} cells in labelled_tensors has a label in "
                f"0..{self.n_labels - 1}; leave it out for a loss without a classification term"
            )
        cells = self.at_shared_points(cells)
        q_y = self.q_y(self.latent_point(self.q_z(cells)), cells)
        cost, informative = classification_cost(q_y, self.evidence(cells))
        return cost[informative].mean()


class _Unobserved(Messenger):
    """Draw one observed site anew."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.name:
            msg.update(value=None, is_observed=False, done=False)


class _Given(Messenger):
    """Take values, and where they are known the distributions they came from, as they are given.

    A guide in train mode would evaluate a sample under another dropout mask than it was drawn with.
    """

    def __init__(self, sites: Mapping[str, tuple[Tensor, Distribution | None]]):
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.sites:
            value, fn = self.sites[msg["name"]]
            msg.update(value=value, done=True, fn=msg["fn"] if fn is None else fn)


def _dimensionwise(distribution: Distribution) -> Distribution:
    """The distribution of each dimension, where they are independent."""
    return distribution.base_dist if isinstance(distribution, TorchIndependent) else distribution


def _of_log(distribution: Distribution) -> Distribution:
    """The Normal of the logarithm, where the distribution is a LogNormal."""
    return distribution.base_dist if isinstance(distribution, TorchLogNormal) else distribution


def _of_exp(distribution: Distribution | None) -> Distribution | None:
    """The LogNormal of which it is the logarithm, where the distribution is a Normal."""
    if not isinstance(distribution, TorchNormal):
        return None
    return LogNormal(distribution.loc, distribution.scale)


def _joint(distribution: Distribution | None) -> Distribution | None:
    """Independent dimensions as one event, where the distribution is known."""
    known = isinstance(distribution, TorchNormal | TorchLogNormal)
    return Independent(distribution, 1) if known else None

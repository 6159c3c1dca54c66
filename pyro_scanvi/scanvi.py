"""SCANVI, the estimator that users meet: AnnData in, AnnData out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from rich.progress import track

from pyro_scanvi import (
    correlation,
    differential,
    elbo,
    expression,
    freezing,
    growing,
    importance,
    interop,
    posterior,
    query,
    saving,
    training,
)
from pyro_scanvi.checks import InputError, check_at_least, check_positive, look_up, positions_of
from pyro_scanvi.comparisons import decoded_batches, find_comparisons
from pyro_scanvi.course import Course, default_max_epochs
from pyro_scanvi.data import library_prior
from pyro_scanvi.fields import UNS_KEY, Fields, storable_names, weights_of
from pyro_scanvi.likelihoods import CountParameters
from pyro_scanvi.nonfinite import NonFiniteError
from pyro_scanvi.plan import Plan
from pyro_scanvi.scanvae import SCANVAE
from pyro_scanvi.trainer import TrainerOptions

EVALUATION_BATCH_SIZE = 512
FROM_DATA = (
    "n_input",
    "n_batch",
    "n_labels",
    "n_continuous_cov",
    "n_cats_per_cov",
    "use_size_factor_key",
)

# For few labels of each type. The defaults, which are those of scvi-tools, learn few labelled cells
# by heart: the encoder then puts them apart from the unlabelled cells of their type.
FEW_LABELS = {"linear_classifier": True, "dropout_rate": 0.5, "n_latent": 20}
FEW_LABELS_PLAN = {"classification_ratio": 500.0}


def few_labels_epochs(n_cells: int) -> int:
    """The default number of epochs, but 150 at most: learning by heart comes with time."""
    return min(default_max_epochs(n_cells), 150)


class SCANVI:
    """Semi-supervised annotation of single cells.

    Parameters
    ----------
    adata
        An AnnData that :meth:`setup_anndata` has seen.
    seed
        Of the initial weights.
    **vae_arguments
        Arguments of :class:`~pyro_scanvi.SCANVAE`, such as ``n_hidden=128`` or ``n_latent=10``;
        those that the data give (numbers of genes, batches, labels, covariates) are not among
        them.

    Attributes
    ----------
    module
        The :class:`~pyro_scanvi.SCANVAE`: a Pyro model and guide.
    fields
        The columns and categories that the model was set up with.
    history
        One row for each epoch and split ("train", "validation"): elbo, reconstruction, one kl_*
        for each latent site, cross_entropy (nats per cell), accuracy, macro_f1 and
        calibration_error of the labelled cells.
    training_settings
        How :meth:`train` was last called.
    freeze
        What may move in training, of a model that :meth:`load_query_data` made; otherwise None.

    Raises
    ------
    InputError
        If the AnnData was not set up or has changed in a way that the model cannot read.
    TypeError
        For an unknown argument; the error names the nearest.

    Examples
    --------
    >>> SCANVI.setup_anndata(adata, labels_key="cell_type", unlabeled_category="Unknown")
    >>> model = SCANVI(adata)
    >>> model.train()
    >>> adata.obs["predicted"] = model.predict()
    """

    def __init__(self, adata: ad.AnnData, seed: int = 0, **vae_arguments: Any):
        check_at_least(0, seed=seed)
        self.fields = Fields.from_uns(adata)
        self.adata = adata
        self.seed = seed
        self._data = self.fields.encode(adata)
        for name in set(FROM_DATA).intersection(vae_arguments):
            raise TypeError(f"{name!r} is given by the data; leave it out")
        self.vae_arguments = vae_arguments
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = SCANVAE(**(self._given_by_data() | vae_arguments)).eval()
        self.history = pd.DataFrame()
        self.training_settings: dict[str, Any] = {}
        self.freeze: freezing.Freeze | None = None

    @classmethod
    def load_scvi_tools(
        cls, directory: str | Path, adata: ad.AnnData, prefix: str = "", seed: int = 0
    ) -> "SCANVI":
        """Open a SCANVI that scvi-tools saved; scvi-tools is not needed, no pickle is executed.

        Parameters
        ----------
        directory, prefix
            As they were given to ``save`` of scvi-tools.
        adata
            Cells with the genes, the columns of obs and the categories that it was trained with;
            it is set up on the way.
        seed
            Of later training.

        Raises
        ------
        InputError
            If the folder holds no SCANVI, or genes or categories differ; it counts and lists them.
        """
        save = interop.read_scvi_save(directory, prefix)
        if save.model_name != "SCANVI":
            raise InputError(
                f"{directory} holds a {save.model_name}; start from it with from_scvi_model"
            )
        Fields.from_scvi_save(save).store(adata)
        arguments = save.arguments()
        model = cls(adata, seed=seed, **_chosen(arguments))
        model.module = SCANVAE.from_scvi_tools(save.state_dict, **arguments)
        return model

    @classmethod
    def from_scvi_model(
        cls,
        directory: str | Path,
        adata: ad.AnnData,
        labels_key: str,
        unlabeled_category: str,
        prefix: str = "",
        seed: int = 0,
    ) -> "SCANVI":
        """A warm start from an unsupervised SCVI that scvi-tools saved.

        Encoder and decoder of the counts come with their weights; the classifier and the networks
        of u are new.

        Parameters
        ----------
        directory, prefix
            As they were given to ``save`` of scvi-tools.
        adata
            Cells with the genes, the columns of obs and the categories that it was trained with.
        labels_key, unlabeled_category
            As in :meth:`setup_anndata`.
        seed
            Of the new weights.

        Raises
        ------
        InputError
            If the folder holds no SCVI, genes or categories differ, or the labels are no labels.
        """
        save = interop.read_scvi_save(directory, prefix)
        if save.model_name != "SCVI":
            raise InputError(f"{directory} holds a {save.model_name}; open it with load_scvi_tools")
        Fields.from_scvi_save(save).labelled_by(adata, labels_key, unlabeled_category).store(adata)
        model = cls(adata, seed=seed, **_chosen(save.arguments()))
        shared = interop.shared_state(model.module, save.state_dict)
        model.module.load_state_dict(shared, strict=False)
        return model

    @staticmethod
    def setup_anndata(
        adata: ad.AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Iterable[str] | None = None,
        continuous_covariate_keys: Iterable[str] | None = None,
    ) -> None:
        """Check an AnnData and note which of its columns mean what.

        What is noted is a plain dict, ``adata.uns["pyro_scanvi"]["setup"]``; it survives
        ``write_h5ad``.

        Parameters
        ----------
        adata
            Cells by genes, raw counts.
        labels_key
            Column of ``obs`` with the labels.
        unlabeled_category
            Its value where the label is not known.
        layer
            Layer with the counts; None is ``X``.
        batch_key
            Column of ``obs`` with the biological batch.
        size_factor_key
            Column of ``obs`` with given size factors.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` with further covariates.

        Raises
        ------
        InputError
            If anything is missing or is not what it should be; nothing is written then.

        Warns
        -----
        UserWarning
            If all cells are labelled, or there is one batch only.
        """
        fields = Fields.from_anndata(
            adata,
            labels_key,
            unlabeled_category,
            layer,
            batch_key,
            size_factor_key,
            categorical_covariate_keys,
            continuous_covariate_keys,
        )
        fields.store(adata)

    def train(
        self,
        max_epochs: int | None = None,
        n_samples_per_label: int | None = None,
        *,
        pretrain_epochs: int = 0,
        train_size: float = 0.9,
        validation_size: float | None = None,
        batch_size: int = 128,
        class_balanced: bool = False,
        cell_weights: str | Sequence[float] | None = None,
        early_stopping: bool = False,
        early_stopping_patience: int = 45,
        check_val_every_n_epoch: int = 1,
        plan_kwargs: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        logger: Logger | Sequence[Logger] | bool = False,
        accelerator: str = "auto",
        devices: int | str | Sequence[int] = "auto",
        precision: str = "32-true",
        checkpoint_dir: str | Path | None = None,
        ckpt_path: str | Path | None = None,
        progress_bar: bool = True,
        seed: int | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
    ) -> "SCANVI":
        """Train, or train on.

        Two runs with the same seed on one machine are equal bit for bit. Ctrl-C ends training
        early and keeps what was learned.

        Parameters
        ----------
        max_epochs
            Passes over the data; None is ``min(round(20000 / n_cells * 400), 400)``.
        n_samples_per_label
            At most so many cells of each label, drawn anew in each epoch, count in the
            classification term; None is all. The ELBO sees every cell.
        pretrain_epochs
            Passes before those, without labels: encoder and decoder are trained as scVI, which is
            a warm start. The history calls them "pretrain"; callbacks see the rest only.
        train_size, validation_size
            Shares of the cells to train on and to score in each epoch; None is the rest.
        batch_size
            Cells in a minibatch.
        class_balanced
            Draw labelled cells so that each label is seen equally often, by the ELBO too. For rare
            types; the probabilities are then those of equally frequent types.
        cell_weights
            Weight of each cell in the objective, positive: numbers or a column of obs. A weight of
            2 is as if the cell were there twice; they are scaled to a mean of 1.
        early_stopping, early_stopping_patience
            Stop when the ELBO of the held-out cells has not risen for so many epochs.
        check_val_every_n_epoch
            Score the held-out cells every so many epochs.
        plan_kwargs
            Fields of :class:`~pyro_scanvi.plan.Plan`: learning rate, optimiser, KL warm-up, ...
        callbacks, logger
            Lightning's, beside our own.
        accelerator, devices, precision
            As for Lightning's Trainer: one device; "32-true", "64-true" or "bf16-mixed".
        checkpoint_dir
            Folder to keep ``last.ckpt`` in, the state after the last epoch that ended.
        ckpt_path
            Go on from such a file. Make the model and call this with the arguments that it was
            started with: it ends as if it had never stopped, bit for bit. Only `max_epochs` may
            differ. No pickle is executed.
        progress_bar
            Show one.
        seed
            Of shuffling, dropout and sampling; None is the model's own. The split is always that
            of the model's seed, so that training on never sees held-out cells.
        trainer_kwargs
            Further arguments of Lightning's Trainer, such as ``max_time``.

        Raises
        ------
        InputError, ValueError, TypeError
            For arguments that make no sense; nothing is computed then.
        NonFiniteError
            If a loss or gradient is not finite: it names the site, the genes and the cells. The
            model keeps the last weights for which both were.
        """
        default_epochs = default_max_epochs(len(self._data))
        course = Course(
            max_epochs=default_epochs if max_epochs is None else max_epochs,
            pretrain_epochs=pretrain_epochs,
            train_size=train_size,
            validation_size=validation_size,
            batch_size=batch_size,
            n_samples_per_label=n_samples_per_label,
            class_balanced=class_balanced,
            early_stopping=early_stopping_patience if early_stopping else None,
            check_val_every_n_epoch=check_val_every_n_epoch,
            seed=self.seed if seed is None else seed,
            split_seed=self.seed,
        )
        options = TrainerOptions(
            callbacks=callbacks,
            logger=logger,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            checkpoint_dir=checkpoint_dir,
            progress_bar=progress_bar,
            trainer_kwargs=trainer_kwargs or {},
        )
        self._fit(Plan.of(plan_kwargs or {}), course, options, cell_weights, ckpt_path)
        return self

    def _fit(
        self,
        plan: Plan,
        course: Course,
        options: TrainerOptions,
        cell_weights: str | Sequence[float] | None,
        ckpt_path: str | Path | None,
    ) -> None:
        data = replace(self._data, weight=weights_of(self.adata, cell_weights))
        rows = self.history.to_dict("records")
        guards = freezing.callbacks(self.module, self.freeze)
        try:
            training.fit(self.module, data, plan, course, options, rows, ckpt_path, guards)
        except NonFiniteError as error:
            error.name(self.adata.obs_names, self.fields.genes)
            raise
        finally:  # what was learned before an error is kept, and told
            self.history = pd.DataFrame(rows)
        self.training_settings = plan.record() | asdict(course)

    @property
    def n_epochs_trained(self) -> int:
        """Number of epochs in the history."""
        return training.epochs_in(self.history.to_dict("records"))

    def predict(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        use_posterior_mean: bool = True,
        method: str = "classifier",
        keep_observed: bool = False,
        n_mc_samples: int = 100,
        seed: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Label of each cell, by the classifier or by Bayes' rule.

        Parameters
        ----------
        adata
            Cells with the genes of the training data; None is the training data.
        indices
            Positions of the cells; None is all.
        soft
            Return probabilities, a DataFrame of cells by classes.
        batch_size
            Cells in a minibatch at most; changes speed and memory, and which numbers are drawn.
        use_posterior_mean
            Classify the mean of q(z | x), not a sample.
        method
            "classifier" is q(y | z). "bayes" is p(y | x), the posterior of the model itself, by
            importance sampling (:mod:`pyro_scanvi.importance`); it never asks the classifier.
        keep_observed
            Cells whose label is known keep it, with probability 1.
        n_mc_samples
            Draws of z for each cell; read by "bayes".
        seed
            Of what is drawn; None draws on from torch's generator.

        Returns
        -------
        ndarray or DataFrame
            Labels, (N,); with `soft` probabilities, (N, L).

        Raises
        ------
        InputError
            If the AnnData is not what the model was set up with.
        ValueError
            For an unknown method, a number of draws below 1, or a negative seed.
        """
        check_at_least(1, n_mc_samples=n_mc_samples)
        check_at_least(0, seed=seed or 0)
        ask = look_up(
            {
                "classifier": partial(
                    posterior.label_probabilities, use_posterior_mean=use_posterior_mean
                ),
                "bayes": partial(importance.label_posterior, n_samples=n_mc_samples),
            },
            method,
            "method",
        )
        data, names = self._encoded(adata, indices)
        with posterior.seeded(seed):
            probabilities = ask(self.module, data, _minibatch_size(batch_size))
        if keep_observed:
            probabilities = posterior.with_known_labels(probabilities, data.label)
        if soft:
            return pd.DataFrame(probabilities, index=names, columns=self.fields.classes)
        return self.fields.classes[probabilities.argmax(1)]

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5000,
        batch_size: int | None = None,
        return_dist: bool = False,
        *,
        seed: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The batch-free state of each cell by q(z | x), (N, n_latent).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        give_mean
            Return the mean of the state, not a draw of it.
        mc_samples
            Draws for the mean of softmax(z) with ``latent_distribution="ln"``, which has no closed
            form; not read otherwise.
        return_dist
            Return mean and variance of q(z | x), each (N, n_latent), before any softmax.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model, or `mc_samples` below 1.
        """
        check_at_least(1, mc_samples=mc_samples)
        data, _ = self._encoded(adata, indices)
        size = _minibatch_size(batch_size)
        if return_dist:
            return posterior.latent_moments(self.module, data, size)
        with posterior.seeded(seed):
            if give_mean:
                return posterior.latent_mean(self.module, data, size, mc_samples)
            return posterior.latent_sample(self.module, data, size)

    def get_normalized_expression(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: str | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        r"""Decoded expression :math:`\rho` of each gene at draws from the guide.

        .. math:: \frac1{|B|} \sum_{s \in B} \mathrm{size} \cdot \rho_g(z, s, c),
            \qquad z \sim q(z \mid x)

        Without size factors the proportions :math:`\rho_g` of a cell sum to 1 (Lopez et al. 2018).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        transform_batch
            Batches B to decode every cell as, at the same draws; a name or several, which are
            averaged over. None is the cell's own batch.
        gene_list
            Genes to return, in this order; None is all.
        library_size
            A number that multiplies :math:`\rho`, or "latent": the cell's own library l, so that
            the result is the mean count :math:`\mu = l \rho`.
        n_samples
            Draws for each cell.
        n_samples_overall
            Draw so many cells with replacement, and one sample for each of them.
        weights
            None or "uniform": cells are drawn with equal probability.
        return_mean
            Average over the draws of a cell.
        return_numpy
            Return an array, not a DataFrame.
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        DataFrame or array
            Cells by genes. With ``n_samples > 1`` and ``return_mean=False`` always an array,
            (n_samples, N, genes).

        Raises
        ------
        InputError
            For unknown batches or genes, naming the nearest; sizes that are no positive numbers;
            both kinds of `n_samples`; a DataFrame of three dimensions.
        """
        scale = _expression_scale(library_size)
        _check_sampling(n_samples, n_samples_overall, weights)
        if n_samples > 1 and not return_mean and return_numpy is False:
            raise InputError(
                "return_numpy=False, but n_samples > 1 with return_mean=False gives three "
                "dimensions, which a DataFrame does not have; leave return_numpy out"
            )
        batches, genes = self._batch_codes(transform_batch), self._gene_positions(gene_list)
        size = _minibatch_size(batch_size)
        data, names = self._encoded(adata, indices)
        with posterior.seeded(seed):
            if n_samples_overall is not None:
                chosen = torch.randint(len(data), (n_samples_overall,)).numpy()
                data, names = data.subset(chosen), names[chosen]
            values = expression.normalized_expression(
                self.module, data, size, scale, batches, genes, n_samples, return_mean
            )
        if return_numpy or values.ndim == 3:
            return values
        return pd.DataFrame(values, index=names, columns=self.fields.genes[genes])

    def get_likelihood_parameters(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        give_mean: bool = False,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> dict[str, np.ndarray]:
        r"""Parameters of :math:`p(x \mid z, l, y, s, c)` at draws from the guide.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        n_samples
            Draws for each cell.
        give_mean
            Average over the draws.
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        dict
            Arrays (N, G), or (n_samples, N, G) for several draws without `give_mean`. "mean":
            :math:`\mu = l \rho` in counts, before any structural zeros. "dispersions": the inverse
            dispersion :math:`\theta`, where the likelihood has one. "dropout": the probability of
            a structural zero, where it has a gate.

        Raises
        ------
        InputError
            For cells that do not fit the model, or `n_samples` below 1.
        """
        check_at_least(1, n_samples=n_samples)
        data, _ = self._encoded(adata, indices)
        with posterior.seeded(seed):
            return expression.likelihood_parameters(
                self.module, data, _minibatch_size(batch_size), n_samples, give_mean
            )

    def get_latent_library_size(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        r"""Library size l of each cell in counts, (N, 1).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        give_mean
            Return the mean :math:`\exp(m + v / 2)` of :math:`q(l \mid x)`; otherwise a draw of it,
            or what the model reads where the library is not latent: the total count or the given
            size factor.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            If a mean is asked for and the library is not latent.
        """
        if give_mean and not self.module.latent_library:
            raise InputError(
                "the library of this model is not latent, so q(l | x) has no mean; "
                "give_mean=False returns the library that the model reads"
            )
        data, _ = self._encoded(adata, indices)
        with posterior.seeded(seed):
            return posterior.library_size(self.module, data, _minibatch_size(batch_size), give_mean)

    def posterior_predictive_sample(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        r"""Counts from :math:`p(x' \mid x) = \int p(x' \mid z, l)\, q(z, l \mid x)\, dz\, dl`.

        The result is a dense array of float32, 4 bytes for each cell, gene and draw; choose cells
        or genes where that is too much.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        transform_batch
            Draw as if every cell were of this batch; None is the cell's own.
        n_samples
            Draws for each cell, each at its own draw of z and l.
        gene_list
            Genes to return, in this order; None is all.
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        array
            (N, genes); with more than one draw (N, genes, n_samples).

        Raises
        ------
        InputError
            For unknown batches or genes, naming the nearest; more than one batch; `n_samples`
            below 1.
        """
        check_at_least(1, n_samples=n_samples)
        batches, genes = self._batch_codes(transform_batch), self._gene_positions(gene_list)
        if len(batches) > 1:
            raise InputError(
                f"transform_batch names {len(batches)} batches, but a cell can be drawn as of one "
                "only (a mean of counts is no count); ask for each batch in turn"
            )
        size = _minibatch_size(batch_size)
        data, _ = self._encoded(adata, indices)
        with posterior.seeded(seed):
            counts = expression.predictive_sample(
                self.module, data, size, batches[0], genes, n_samples
            )
        return counts[..., 0] if n_samples == 1 else counts

    def get_feature_correlation_matrix(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 10,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: str | Sequence[str] | None = None,
        correlation_type: str = "spearman",
        *,
        seed: int | None = None,
    ) -> pd.DataFrame:
        r"""Correlation of genes over denoised expression, genes by genes.

        .. math:: w_g \sim \mathrm{Gamma}(\theta_g,\ \theta_g / (\mathrm{size} \cdot \rho_g(z))),
            \qquad z \sim q(z \mid x),

        the negative binomial at one size for all cells, without its Poisson noise and without
        structural zeros. A likelihood without :math:`\theta`, such as the Poisson, has no Gamma
        noise: :math:`w = \mathrm{size} \cdot \rho(z)`.

        Memory grows with genes squared. Ranks ("spearman") go through a temporary file of
        4 bytes x cells x `n_samples` x genes, and one gene at a time is held in memory.

        Parameters
        ----------
        adata, indices
            As in :meth:`predict`.
        n_samples
            Draws for each cell.
        batch_size
            Cells in a minibatch.
        rna_size_factor
            Size of every cell in counts.
        transform_batch
            Batches to decode every cell as; a name or several, whose matrices are averaged. None
            is the cell's own batch.
        correlation_type
            "spearman" or "pearson".
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        DataFrame
            NaN for genes that do not vary.

        Raises
        ------
        InputError
            For unknown batches or types of correlation, a single draw in all, sizes that are no
            positive numbers, or a disk without place for the temporary file.
        """
        check_at_least(1, n_samples=n_samples, batch_size=batch_size)
        check_positive(rna_size_factor=rna_size_factor)
        correlate = look_up(correlation.CORRELATIONS, correlation_type, "correlation_type")
        batches = self._batch_codes(transform_batch)
        data, _ = self._encoded(adata, indices)
        if n_samples * len(data) == 1:
            raise InputError("one draw of one cell has no correlation; choose more of either")
        with posterior.seeded(seed):
            matrix = correlation.correlation_of_genes(
                self.module, data, batch_size, correlate, n_samples, rna_size_factor, batches
            )
        return pd.DataFrame(matrix, index=self.fields.genes, columns=self.fields.genes)

    def get_elbo(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        feed_labels: bool = False,
        *,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r"""Evidence lower bound in nats per cell; higher is better.

        .. math:: \mathbb E_q[\log p(x \mid z, l) + \log p(z \mid u, y) - \log q(z \mid x)]
            - \mathrm{KL}_u - \mathrm{KL}_y - \mathrm{KL}_l \le \log p(x)

        at KL weight 1, without the classification term; exact over y and at one draw of z
        (Xu et al. 2021, eq. 5; Kingma et al. 2014, eqs. 6 and 7).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        return_mean
            Return the mean over cells, a number; otherwise one number for each cell, (N,).
        feed_labels
            True: bound :math:`\log p(x, y)` where the label is known, and :math:`\log p(x)`
            elsewhere. False: bound :math:`\log p(x)` of every cell, as scvi-tools does.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model.
        """
        data, _ = self._encoded(adata, indices)
        with posterior.seeded(seed):
            found = elbo.cell_elbo(self.module, data, _minibatch_size(batch_size), feed_labels)
        return _mean_or_each(found, return_mean)

    def get_reconstruction_error(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        *,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r""":math:`-\mathbb E_q \log p(x \mid z, l, y)` in nats per cell; lower is better.

        It is exact over y and at one draw of z. scvi-tools returns a dict whose
        "reconstruction_loss" also holds :math:`\log q(z \mid x) - \log p(z \mid u, y)`; this is
        another quantity, and a number.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        return_mean
            Return the mean over cells, a number; otherwise one number for each cell, (N,).
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model.
        """
        data, _ = self._encoded(adata, indices)
        with posterior.seeded(seed):
            found = elbo.cell_reconstruction(self.module, data, _minibatch_size(batch_size))
        return _mean_or_each(found, return_mean)

    def _batch_codes(self, names: str | Sequence[str] | None) -> list[int | None]:
        """Codes of the batches to decode cells as; None is the cell's own."""
        if names is None:
            return [None]
        names = [names] if np.ndim(names) == 0 else names
        return positions_of(names, self.fields.batches, "transform_batch")

    def _gene_positions(self, names: Sequence[str] | None) -> slice | list[int]:
        """Where the named genes stand; None is all."""
        if names is None:
            return slice(None)
        if np.ndim(names) == 0:
            raise InputError(f"gene_list={names!r}, expected a list of names of genes")
        return positions_of(names, self.fields.genes, "gene_list")

    def get_marginal_ll(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1000,
        batch_size: int | None = None,
        return_mean: bool = True,
        n_inner_samples: int = importance.N_INNER_SAMPLES,
        feed_labels: bool = False,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r"""Marginal log likelihood :math:`\log p(x)`, estimated by importance sampling.

        The estimate lies between the ELBO and :math:`\log p(x)` in expectation, and rises with
        the draws; see :mod:`pyro_scanvi.importance`.

        Parameters
        ----------
        adata
            Cells with the genes of the training data; None is the training data.
        indices
            Positions of the cells; None is all.
        n_mc_samples
            Draws of z, and of a latent library, for each cell.
        batch_size
            Cells in a minibatch at most; changes speed and memory, and which numbers are drawn.
        return_mean
            Return the mean over cells, not the value of each.
        n_inner_samples
            Draws of u for each of them and each label.
        feed_labels
            A cell with a known label contributes :math:`\log p(x, y)`, as in the ELBO that
            ``feed_labels`` of the training plan chooses.
        seed
            Of what is drawn; None draws on from torch's generator.

        Returns
        -------
        float or ndarray
            Nats per cell; without `return_mean` (N,).

        Raises
        ------
        InputError
            If the AnnData is not what the model was set up with.
        ValueError
            For a number of draws below 1, or a negative seed.
        """
        check_at_least(1, n_mc_samples=n_mc_samples, n_inner_samples=n_inner_samples)
        check_at_least(0, seed=seed or 0)
        data, _ = self._encoded(adata, indices)
        batch_size = _minibatch_size(batch_size)
        with posterior.seeded(seed):
            log_likelihood = importance.marginal_log_likelihood(
                self.module, data, batch_size, n_mc_samples, n_inner_samples, feed_labels
            )
        return float(log_likelihood.mean()) if return_mean else log_likelihood

    def differential_expression(
        self,
        adata: ad.AnnData | None = None,
        groupby: str | None = None,
        group1: Any = None,
        group2: Any = None,
        idx1: Sequence[int] | Sequence[bool] | str | None = None,
        idx2: Sequence[int] | Sequence[bool] | str | None = None,
        mode: str = "change",
        delta: float | None = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool = False,
        batchid1: Sequence[str] | None = None,
        batchid2: Sequence[str] | None = None,
        fdr_target: float = 0.05,
        silent: bool = False,
        weights: str | None = "uniform",
        filter_outlier_cells: bool = False,
        n_samples_overall: int = differential.N_DRAWS,
        pseudocounts: float | None = None,
        test_mode: str = "three",
        seed: int | None = None,
    ) -> pd.DataFrame:
        r"""Test every gene between groups of cells, by the expression that the model decodes.

        .. math::

            r = \log_2(\rho_1 + c) - \log_2(\rho_2 + c), \qquad
            p_{de} = \max\{P(r \ge \delta),\ P(r \le -\delta)\}

        over pairs of draws: a cell of group 1 and one of group 2 at random, each decoded at a
        sample of q(z | x). The columns are those of scvi-tools. Mode "change": Boyeau et al.
        (2019), bioRxiv 794289. Mode "vanilla": Lopez et al. (2018), Nat Methods 15:1053.

        Parameters
        ----------
        adata
            Cells with the genes of the training data; None is the training data.
        groupby
            Column of ``obs`` with the groups. Of the labels, "unlabelled" is a group too.
        group1
            One group or several, each compared on its own; None is all.
        group2
            The group to compare with; None is the rest, all other cells alike, so that large groups
            make up most of it.
        idx1, idx2
            Cells instead of groups: a mask, positions, or a query of ``obs``; idx2=None is all
            other cells.
        mode
            "change", how probable is a fold change beyond `delta`; or "vanilla", how probable is it
            that expression is higher in group 1 by whatever amount. (scvi-tools' default is
            "vanilla".)
        delta
            Smallest log2 fold change that counts; None estimates it from the genes. Mode "change".
        batch_size
            Cells in a minibatch.
        all_stats
            Add raw_mean, non_zeros_proportion and raw_normalized_mean (per 10,000 counts).
        batch_correction
            Decode the cells of both groups as if of the same batch, an equal share of the draws in
            each, and pair draws of one batch. Without it a difference between batches is one
            between groups that lie in different batches. Other covariates are not corrected for.
        batchid1, batchid2
            Batches to decode each group in, by their names in ``obs``; None is all. The same for
            both, or sets that do not meet; then draws of different batches are paired.
        fdr_target
            ``is_de_fdr_*`` marks the most genes whose expected share of false calls,
            the mean of their ``proba_not_de``, is at most this. Mode "change".
        silent
            Show no progress bar.
        weights
            "uniform"; "importance" is refused, as those of scvi-tools assume another prior of z.
        filter_outlier_cells
            Draw only from the cells within an ellipse of nine tenths of their group in latent
            space (scikit-learn's EllipticEnvelope). Raw statistics are of all cells.
        n_samples_overall
            Pairs of draws, S. Each cell is drawn as often as any other of its group, or once more.
        pseudocounts
            c, added to expression before the logarithm in `p_de`; None estimates it from genes with
            a mean count below 0.01 in a group.
        test_mode
            "three" is the formula above; "two" is :math:`p_{de} = P(|r| \ge \delta)`, as in Boyeau
            et al., which counts up and down together: a gene that varies within both groups has
            large changes both ways, and comes near 1 without any difference between them.
        seed
            Of the draws. The table of a group is the same whichever others are asked for.

        Returns
        -------
        DataFrame
            One row for each gene and comparison, the surest first. Mode "change": proba_de,
            proba_not_de, bayes_factor (log odds, nats), scale1 and scale2 (mean expression),
            pseudocounts, delta, lfc_mean, lfc_median, lfc_std, lfc_min, lfc_max and, last,
            is_de_fdr_*. Mode "vanilla": proba_m1 (higher in group 1), proba_m2, bayes_factor,
            scale1, scale2. With groups: comparison, group1, group2.

        Raises
        ------
        InputError
            For unknown columns, groups, batches or settings, numbers out of range, groups that are
            empty or share cells.

        Notes
        -----
        As in scvi-tools, lfc_* are taken with a thousandth of the pseudocount, so that they can be
        large for genes that neither group expresses; and c is divided by the number of genes,
        which leaves little of it. Give `pseudocounts`, such as 1e-4, to count such genes less.

        The probabilities are about these cells and take the decoder for true. They do not say how
        other donors differ, and the share of false calls can be larger than `fdr_target`: in
        simulations of 400 cells and 100 genes it was 0.09 to 0.29 at 0.05 with delta=0.25, 0.05 to
        0.17 with delta=0.5. Where most calls are sure, the last ones can be genes of low `p_de`.
        """
        differential.check_weights(weights)
        if seed is not None:
            check_at_least(0, seed=seed)
        settings = differential.Settings(
            mode, delta, pseudocounts, test_mode, fdr_target, all_stats
        )
        batches = decoded_batches(self.fields.batches, batch_correction, batchid1, batchid2)
        check_at_least(max(map(len, batches)), n_samples_overall=n_samples_overall)
        data, _ = self._encoded(adata, None)
        obs = (self.adata if adata is None else adata).obs
        comparisons = find_comparisons(obs, groupby, group1, group2, idx1, idx2)
        batch_size = _minibatch_size(batch_size)

        def draws(cells: np.ndarray, codes: Sequence[int | None]) -> np.ndarray:
            if filter_outlier_cells:
                latent = posterior.over_minibatches(
                    self.module, data.subset(cells), batch_size, lambda c: self.module.q_z(c).mean
                )
                cells = differential.without_outliers(cells, latent)
            return expression.expression_draws(
                self.module, data, cells, codes, n_samples_overall, batch_size
            )

        samplers = tuple(partial(draws, codes=codes) for codes in batches)
        tables = []
        for comparison in track(comparisons, "Differential expression", disable=silent):
            with posterior.seeded(seed):
                tables.append(
                    differential.compare(
                        comparison, samplers, data.counts, self.fields.genes, settings
                    )
                )
        return pd.concat(tables)

    @staticmethod
    def prepare_query_anndata(
        adata: ad.AnnData,
        reference: "SCANVI | str | Path",
        return_reference_var_names: bool = False,
    ) -> ad.AnnData | pd.Index:
        """A new AnnData of the same cells with the genes of a reference, in its order.

        Genes that the reference lacks are left out; genes that `adata` lacks are zero in ``X``
        and in every layer, and ``var["in_query"]`` is False for them. Sparse matrices stay sparse
        and become CSR. ``obs``, ``obsm``, ``obsp`` and ``uns`` are copied; other columns of
        ``var``, ``varm`` and ``raw`` are not. `adata` itself stays as it is, so nothing is lost
        (scvi-tools works in place).

        Parameters
        ----------
        adata
            Cells with raw counts where the reference reads them.
        reference
            A model, or the folder of a saved one.
        return_reference_var_names
            Return the names of the reference's genes instead.

        Raises
        ------
        InputError
            If no gene is shared, the reference is none, or the layer with the counts is missing.

        Warns
        -----
        UserWarning
            If fewer than 80 % of the reference's genes are there.
        """
        fields = _as_reference(reference).fields
        if return_reference_var_names:
            return pd.Index(fields.genes)
        return query.prepare(adata, fields)

    @classmethod
    def load_query_data(
        cls,
        adata: ad.AnnData,
        reference: "SCANVI | str | Path",
        *,
        unfrozen: bool = False,
        freeze_dropout: bool = False,
        freeze_expression: bool = True,
        freeze_decoder_first_layer: bool = True,
        freeze_batchnorm_encoder: bool = True,
        freeze_batchnorm_decoder: bool = False,
        freeze_classifier: bool = True,
        extend_labels: Iterable[str] = (),
        extend_categories: bool = True,
        seed: int | None = None,
    ) -> "SCANVI":
        """A model of new cells that holds the weights of a trained reference (scArches).

        Batches and covariate categories that the reference has not seen become new ones. They
        start as an average old one (see :mod:`pyro_scanvi.growing`), so the model can predict at
        once; cells of old categories get the outputs of the reference. :meth:`train` then moves,
        of all weights:

        - always: the entries of new categories, that is the one-hot columns of new batches and
          categories in the decoder of x (and in the encoders of z and l with
          ``encode_covariates``), rows of the batch embedding, and rows of ``dispersion=
          "gene-batch"``; for new labels the rows of the classifier's last layer and of
          ``dispersion="gene-label"``, and the columns in the u encoder and the decoder of z;
        - by each flag that is False, what that flag names.

        All else does not change by one bit, whatever the optimiser; :meth:`state_diff` proves it.
        Not even the l encoder moves, unlike in scvi-tools. Unless ``encode_covariates``, or a
        flag, lets the encoder or the classifier move, predictions are those of the reference,
        trained or not: training teaches the decoder alone. Where the query is a single new batch,
        a batch norm that trains takes away whatever the batch's column adds before it, and learns
        the shift of the batch itself; for the columns to learn, freeze the batch norms.

        The prior of a latent library is that of the reference for old batches and comes from the
        query for new ones.

        Parameters
        ----------
        adata
            Cells with the genes of the reference (see :meth:`prepare_query_anndata`) and its
            columns of ``obs``; a column of labels may be missing. It is set up on the way.
        reference
            A model, or the folder of a saved one; it stays as it is. May be a query model itself.
        unfrozen
            Everything trains; the other flags are not read.
        freeze_dropout
            No dropout while training.
        freeze_expression
            False: the whole first linear layer of the encoders of z and l trains.
        freeze_decoder_first_layer
            False: the whole first linear layer of the decoder of x trains.
        freeze_batchnorm_encoder
            False: batch norms of the encoders of z, l and u train, their weights and statistics.
        freeze_batchnorm_decoder
            False, the default: batch norms of the decoders of x and z train, their weights and
            statistics. Cells of the reference are then decoded differently after training; True
            keeps the reference exactly.
        freeze_classifier
            False: the whole classifier trains, its batch norms included.
        extend_labels
            Labels of the query that the reference does not know. Old labels keep their relative
            prior probabilities, each new one of L labels has 1 / L. A new type is told apart only
            as far as the frozen layers before the last one tell it apart; with
            ``freeze_classifier=False, freeze_expression=False`` it is learned faster.
        extend_categories
            False: an unseen batch or category is an error.
        seed
            Of later training; None is that of the reference.

        Raises
        ------
        InputError
            If the reference is none, genes or columns are missing, labels are unknown and not
            among `extend_labels` or those clash with known ones, the labels have groups while
            some are new, or a parameter of one's own depends on the number of categories.

        Warns
        -----
        UserWarning
            If a label of `extend_labels` labels no cell.

        References
        ----------
        Lotfollahi et al. (2022), Nat Biotechnol 40:121.
        """
        source = _as_reference(reference)
        seed = source.seed if seed is None else seed
        check_at_least(0, seed=seed)
        flags = {
            "unfrozen": unfrozen,
            "freeze_dropout": freeze_dropout,
            "freeze_expression": freeze_expression,
            "freeze_decoder_first_layer": freeze_decoder_first_layer,
            "freeze_batchnorm_encoder": freeze_batchnorm_encoder,
            "freeze_batchnorm_decoder": freeze_batchnorm_decoder,
            "freeze_classifier": freeze_classifier,
        }
        fields = query.extended(source.fields, adata, extend_labels, extend_categories)
        arguments = source.grown_arguments(len(fields.classes))
        freezing.Freeze(new={}, **flags)  # checks them before the AnnData is touched
        fields.store(adata)
        model = cls(adata, seed=seed, **arguments)
        with torch.random.fork_rng():
            model.module = growing.grow(source.vae, model._given_by_data() | arguments)
        model.freeze = freezing.frozen(source.vae, model.module, **flags)
        return model

    def state_diff(self, reference: "SCANVI | str | Path") -> pd.DataFrame:
        """What differs from a reference, entry by entry: the proof of a freeze.

        Parameters
        ----------
        reference
            The model that this one was loaded from, or its folder.

        Returns
        -------
        DataFrame
            One row for each tensor of the state dict, buffers included: ``name``; ``entries``;
            ``new``, entries of categories that the reference has not; ``trainable``, entries
            that training may move; ``changed``, entries that are not new and differ in any bit;
            ``max_change``, the largest absolute difference among them. A variable of one category
            has no one-hot column: where it grew, the old category's column counts as zeros of the
            reference. With new labels ``y_prior`` differs, as its sum stays 1.

        Raises
        ------
        InputError
            If this model did not grow out of the reference.
        """
        source = _as_reference(reference)
        query.check_grown(source.fields, self.fields)
        return pd.DataFrame(freezing.state_diff(self.module, source.vae, self.freeze))

    def annotate(self, adata: ad.AnnData | None = None) -> ad.AnnData:
        """Write predictions and latent space into an AnnData; None is the training data.

        Adds ``obs["scanvi_prediction"]``, ``obs["scanvi_confidence"]`` (probability of the
        predicted label), ``obsm["scanvi_probabilities"]`` (a DataFrame, one column a class),
        ``obsm["X_scanvi"]``, and to ``uns["pyro_scanvi"]`` version, settings, seed and final
        losses (nats per cell).
        """
        adata = self.adata if adata is None else adata
        soft = self.predict(adata, soft=True)
        latent = self.get_latent_representation(adata, seed=self.seed)
        soft.columns = storable_names(self.fields.classes)
        predicted = self.fields.classes[soft.to_numpy().argmax(1)]
        adata.obs["scanvi_prediction"] = pd.Categorical(predicted, categories=self.fields.classes)
        adata.obs["scanvi_confidence"] = soft.max(axis=1)
        adata.obsm["scanvi_probabilities"] = soft
        adata.obsm["X_scanvi"] = latent
        adata.uns[UNS_KEY] = {"setup": self.fields.to_uns()} | self._record()
        return adata

    def save(
        self, directory: str | Path, overwrite: bool = False, save_anndata: bool = False
    ) -> None:
        """Write the model into a folder, whole or not at all: safetensors and JSON, no pickle.

        Parameters
        ----------
        directory
            A folder that does not exist yet.
        overwrite
            Replace a model that was saved there.
        save_anndata
            Write the training data too, for :meth:`load` without an AnnData.

        Raises
        ------
        InputError
            If the folder exists or cannot be written, or an argument of the model is a callable.
        """
        directory = Path(directory)
        saving.check_target(directory, overwrite)
        record = {
            "version": version("pyro-scanvi"),
            "seed": self.seed,
            "arguments": saving.plain(self.vae_arguments, "the model's argument"),
            "fields": saving.plain(asdict(self.fields), "a field"),
            "history": self.history.to_dict(orient="list"),
            "training_settings": self.training_settings,
            "freeze": None if self.freeze is None else asdict(self.freeze),
        }
        adata = self.adata if save_anndata else None
        saving.write_model(directory, self.module.state_dict(), record, adata)

    @classmethod
    def load(cls, directory: str | Path, adata: ad.AnnData | None = None) -> "SCANVI":
        """Open a model that :meth:`save` wrote; its predictions are equal to the bit.

        Parameters
        ----------
        directory
            The folder.
        adata
            Cells with the genes and categories of the training data; None is the AnnData that was
            saved with the model.

        Raises
        ------
        InputError
            If the folder is damaged, holds no AnnData while none is given, or the AnnData differs
            from what the model knows; it says in what.
        """
        state, record, saved = saving.read_model(Path(directory), with_anndata=adata is None)
        adata = saved if adata is None else adata
        Fields.from_json(record["fields"]).store(adata)
        model = cls(adata, seed=record["seed"], **record["arguments"])
        model.module.load_state_dict(state)
        model.history = pd.DataFrame(record["history"])
        model.training_settings = record["training_settings"]
        if record.get("freeze"):  # not in records of plain models, nor in old ones
            model.freeze = freezing.Freeze(**record["freeze"])
            freezing.hold(model.module, model.freeze)
        return model

    def _record(self) -> dict[str, Any]:
        """What was done, as a plain dict."""
        last = self.history.groupby("split").last() if len(self.history) else pd.DataFrame()
        losses = {s: row.drop("epoch").dropna().to_dict() for s, row in last.iterrows()}
        return {
            "version": version("pyro-scanvi"),
            "seed": self.seed,
            "n_epochs": self.n_epochs_trained,
            "settings": {
                "model": {k: str(v) for k, v in self.vae_arguments.items()},
                "training": self.training_settings,
            },
            "final_losses": losses,
        }

    def _given_by_data(self) -> dict[str, Any]:
        """Sizes, and the prior of a latent library."""
        sizes = self.fields.sizes()
        if self.vae_arguments.get("use_observed_lib_size", True):
            return sizes
        means, variances = library_prior(self._data, sizes["n_batch"])
        return sizes | {"library_log_means": means, "library_log_vars": variances}

    def _encoded(self, adata: ad.AnnData | None, indices: Sequence[int] | None):
        data = self._data if adata is None else self.fields.encode(adata)
        names = (self.adata if adata is None else adata).obs_names
        if indices is None:
            return data, names
        positions = np.arange(len(data))[np.asarray(indices, dtype=None if len(indices) else int)]
        if not len(positions):
            raise InputError("indices selects no cell; give the positions of some")
        return data.subset(positions), names[positions]


def _chosen(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of SCANVAE that the data do not give."""
    return {k: v for k, v in arguments.items() if k not in FROM_DATA}


def _minibatch_size(batch_size: int | None) -> int:
    if batch_size is None:
        return EVALUATION_BATCH_SIZE
    check_at_least(1, batch_size=batch_size)
    return batch_size


def _expression_scale(library_size: float | str) -> Callable[[CountParameters], torch.Tensor]:
    """From count parameters to expression at the size that was asked for."""
    scale = look_up(expression.SCALES, library_size, "library_size")
    if callable(scale):
        return scale
    check_positive(library_size=scale)
    return lambda p: p.rho * scale


def _check_sampling(n_samples: int, n_samples_overall: int | None, weights: str | None) -> None:
    check_at_least(1, n_samples=n_samples)
    if weights not in (None, "uniform"):
        raise InputError(
            f"weights={weights!r}, expected None or 'uniform'; importance weights are not offered"
        )
    if n_samples_overall is None:
        return
    check_at_least(1, n_samples_overall=n_samples_overall)
    if n_samples != 1:
        raise InputError("n_samples and n_samples_overall are both given; choose one")


def _mean_or_each(values: np.ndarray, mean: bool) -> float | np.ndarray:
    return float(values.mean(dtype=np.float64)) if mean else values


def _as_reference(reference: SCANVI | str | Path) -> query.Reference:
    """What a query needs of a model or of the folder of a saved one."""
    if isinstance(reference, SCANVI):
        parts = (reference.module, reference.fields, reference.vae_arguments, reference.seed)
        return query.Reference(*parts)
    if isinstance(reference, str | Path):
        return query.Reference.read(Path(reference))
    raise InputError(
        f"the reference is a {type(reference).__name__}, expected a SCANVI or the folder of one"
    )

"""SCANVI, the estimator that users meet: AnnData in, AnnData out."""

import hashlib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from pyro_scanvi.annotation.consensus import Consensus, fit_consensus, labelled_cells
from pyro_scanvi.annotation.strangers import warn_of_strangers
from pyro_scanvi.data.columns import weights_of
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.label_sources import LabelSources
from pyro_scanvi.data.labels import WRITTEN
from pyro_scanvi.data.minibatches import UNLABELED, CellData, library_prior, split
from pyro_scanvi.data.notes import UNS_KEY
from pyro_scanvi.estimator import summary
from pyro_scanvi.estimator.saved import Saved
from pyro_scanvi.model.objectives import Layered, Objective
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import first
from pyro_scanvi.posterior.correlation import Correlation
from pyro_scanvi.posterior.differential import DifferentialExpression
from pyro_scanvi.posterior.draws import minibatch_size, seeded
from pyro_scanvi.posterior.evidence import Evidence
from pyro_scanvi.posterior.expression import Expression
from pyro_scanvi.posterior.labels import CLASSIFIER, CONSENSUS, Labels, latent_points
from pyro_scanvi.posterior.latent import LatentSpace
from pyro_scanvi.scvi_tools import names as scvi_names
from pyro_scanvi.scvi_tools.saves import read_save
from pyro_scanvi.scvi_tools.weights import shared_state
from pyro_scanvi.storage import models
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.storage.parts import (
    name_of_part,
    names_of_parts,
    parts_in,
    with_parts,
    without_parts,
)
from pyro_scanvi.storage.storable import storable, storable_names
from pyro_scanvi.surgery import freezing, growing, query
from pyro_scanvi.training import runs
from pyro_scanvi.training.history import History
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.training.ranks import is_first
from pyro_scanvi.training.settings import DataSettings, Plan, TrainerSettings, default_max_epochs
from pyro_scanvi.training.trainer import free_arguments
from pyro_scanvi.validation import (
    InputError,
    check_flags,
    check_seed,
    plain,
    plain_arguments,
    plain_number,
)

FROM_DATA = (
    "n_input",
    "n_batch",
    "n_labels",
    "n_continuous_cov",
    "n_cats_per_cov",
    "use_size_factor_key",
    "n_extra",
    "n_annotators",
)

PLAN_SETTINGS = [field.name for field in fields(Plan) if field.name != "objective"]

# Where they differ from those of SCANVAE, which are scvi-tools'.
DEFAULTS: dict[str, Any] = {"n_latent": 20, "dropout_rate": 0.5, "linear_classifier": True}


class SCANVI(
    Labels,
    LatentSpace,
    Expression,
    Correlation,
    DifferentialExpression,
    Evidence,
    metaclass=scvi_names.Names,
):
    """Semi-supervised annotation of single cells.

    Parameters
    ----------
    adata
        An AnnData that :meth:`setup_anndata` has seen.
    seed
        Of the initial weights.
    module_class
        :class:`~pyro_scanvi.SCANVAE` or a subclass of one's own, with other factors.
    **vae_arguments
        Arguments of :class:`~pyro_scanvi.SCANVAE`, such as ``n_hidden=128``; those that the data
        give (numbers of genes, batches, labels, covariates) are not among them. Three have other
        defaults here: ``n_latent=20``, ``dropout_rate=0.5``, ``linear_classifier=True``.

    Attributes
    ----------
    module
        The :class:`~pyro_scanvi.SCANVAE`: a Pyro model and guide.
    fields
        The columns and categories that the model was set up with.
    history
        One row for each epoch and split ("train", "validation"; of a warm start "pretrain",
        "pretrain_validation"): elbo, reconstruction, one kl_* for each latent site,
        cross_entropy (nats per cell), accuracy, macro_f1 and calibration_error of the classifier
        on the labelled cells. It also answers as that of scvi-tools does,
        ``history["elbo_train"]``; see :class:`~pyro_scanvi.training.history.History`.
    training_settings
        How :meth:`train` was last called.
    is_trained
        Whether the weights have been trained, here or where they come from: after an epoch of
        :meth:`train`, and for models that were opened. A query model has it from its reference; a
        warm start alone does not count. Questions refuse a model for which it is False; set it
        where the weights are meant as they are.
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
    >>> from pyro_scanvi import SCANVI, datasets
    >>> adata = datasets.pbmc68k_counts()
    >>> adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], n_per_label=10, seed=0)
    >>> SCANVI.setup_anndata(adata, labels_key="given", unlabeled_category="Unknown")
    >>> model = SCANVI(adata)
    >>> model = model.train(max_epochs=1, progress_bar=False)  # 150 in earnest
    >>> adata.obs["predicted"] = model.predict()
    >>> model.predict(soft=True).shape  # cells by types
    (700, 10)
    >>> model.get_latent_representation().shape
    (700, 20)
    """

    def __init__(
        self,
        adata: ad.AnnData,
        seed: int = 0,
        module_class: type[SCANVAE] = SCANVAE,
        **vae_arguments: Any,
    ):
        scvi_names.check_model_arguments(adata, vae_arguments)
        seed, vae_arguments = plain_number(seed), plain(vae_arguments)
        check_seed(seed)
        self.fields = Fields.from_uns(adata)
        self.adata = adata
        self.seed = seed
        # What the model reads is its own: users go on to normalise and filter in place.
        self._data, self._cells = self.fields.encode(adata), adata.obs_names
        for name in set(FROM_DATA).intersection(vae_arguments):
            raise TypeError(f"{name!r} is given by the data; leave it out")
        self.vae_arguments = DEFAULTS | vae_arguments
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = module_class(**(self._given_by_data() | self.vae_arguments)).eval()
        self.history = History()
        self.training_settings: dict[str, Any] = {}
        self.is_trained = False
        self.freeze: freezing.Freeze | None = None
        self.rules = Rules()

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
        scvi_names.check_saved(directory)
        save = read_save(directory, prefix)
        if save.model_name != "SCANVI":
            raise InputError(
                f"{directory} holds a {save.model_name}; start from it with from_scvi_model"
            )
        arguments = save.arguments()
        with Fields(**save.fields()).noted(adata):
            model = cls(adata, seed=seed, **_explicit(arguments))
        model.module = SCANVAE.from_scvi_tools(save.state_dict, **arguments)
        model.is_trained = True
        model.rules = Rules(honest=False)  # labels have shaped its latent space
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
        of u are new, so that the model does not answer before it is trained.

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
        scvi_names.check_saved(directory)
        save = read_save(directory, prefix)
        if save.model_name != "SCVI":
            raise InputError(f"{directory} holds a {save.model_name}; open it with load_scvi_tools")
        fields = Fields(**save.fields()).labelled_by(adata, labels_key, unlabeled_category)
        with fields.noted(adata):
            model = cls(adata, seed=seed, **_explicit(save.arguments()))
        shared = shared_state(model.module.state_dict(), save.state_dict)
        model.module.load_state_dict(shared, strict=False)
        return model

    @staticmethod
    @plain_arguments
    def setup_anndata(
        adata: ad.AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Iterable[str] | None = None,
        continuous_covariate_keys: Iterable[str] | None = None,
        use_raw: bool = False,
        n_top_genes: int | None = None,
        extra: Mapping[str, str] | None = None,
        labels: Iterable | None = None,
        label_sets: Mapping[str, Iterable] | None = None,
        label_parents: Mapping[str, str] | None = None,
        coarse_labels_key: str | None = None,
        soft_labels_key: str | None = None,
        annotator_keys: Iterable[str] | None = None,
        **unknown: Any,
    ) -> None:
        """Check an AnnData and note which of its columns mean what.

        What is noted is a plain dict, ``adata.uns["pyro_scanvi"]["setup"]``; it survives
        ``write_h5ad``.

        Parameters
        ----------
        adata
            Cells by genes, raw counts, in memory or on the disk: ``backed``, or anndata's
            ``sparse_dataset`` (docs/large_data.md).
        labels_key
            Column of ``obs`` with the labels.
        unlabeled_category
            Its value where the label is not known; so are cells without a value (NaN).
        layer
            Layer with the counts; None is ``X``. "raw" is ``raw.X`` where no layer has that name.
        batch_key
            Column of ``obs`` with the biological batch.
        size_factor_key
            Column of ``obs`` with given size factors.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` with further covariates.
        use_raw
            The counts stand in ``raw.X``, with its genes, as in files of CELLxGENE.
        n_top_genes
            Read the most variable genes only, as scanpy chooses them within each batch; the
            AnnData keeps all of them. Which they are is noted, and those of new cells are read.
            None is all genes.
        extra
            Further data of each cell for a model of one's own, from a name to a place:
            ``{"protein": "obsm/protein_counts", "spliced": "layers/spliced", "age": "obs/age"}``.
            The model gets them as ``cells.extra["protein"]``, (N, D) in float32, and their widths
            as ``self.n_extra``. Layers are read with the genes of the model; obsm holds an array,
            a sparse matrix or a DataFrame, whose columns are found by name in new cells, and a row
            of NaN for a cell that was not measured; obs a column of numbers or booleans. All other
            numbers are finite.
        labels
            Labels that exist though they may label no cell; they come after those that do.
        label_sets
            Values of `labels_key` that stand for several labels, from a name to the labels, or to
            names of other sets: ``{"T cell": ["CD4 T", "CD8 T"]}``.
        label_parents
            The same as a tree, from each label or node to the node above it.
        coarse_labels_key
            Column of ``obs`` with coarser labels, read where the label is not known. Each stands
            for those labels that it stands beside in other cells, or for its `label_sets`.
        soft_labels_key
            Matrix of ``obsm`` with probabilities of labels, read where nothing else is known: a
            DataFrame with columns called as the labels, which a label without one has as zeros, or
            an array in their order; a row of NaN or zeros is none. They are taken for p(what is
            known | label), up to a factor.
        annotator_keys
            Columns of ``obs`` with the labels of further annotators; see ``label_noise`` of
            :class:`~pyro_scanvi.SCANVAE`, without which they must not err.

        Raises
        ------
        InputError
            If anything is missing or is not what it should be; nothing is written then.
        TypeError
            For `unknown` arguments; it names the nearest, or what has the place of scvi-tools'.

        Warns
        -----
        UserWarning
            If all cells are labelled, there is one batch only, counts were fractions, which the
            model reads rounded, or categories differ in case and blanks alone.
        """
        scvi_names.check_setup_arguments(SCANVI.setup_anndata, unknown)
        check_flags(use_raw=use_raw)
        fields = Fields.from_anndata(
            adata,
            labels_key,
            unlabeled_category,
            layer,
            batch_key,
            size_factor_key,
            categorical_covariate_keys,
            continuous_covariate_keys,
            use_raw,
            n_top_genes,
            extra,
            LabelSources.of(
                labels,
                label_sets,
                label_parents,
                coarse_labels_key,
                soft_labels_key,
                annotator_keys,
            ),
        )
        fields.note(adata)

    @plain_arguments
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
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        logger: Logger | Sequence[Logger] | bool = False,
        accelerator: str = "auto",
        devices: int | str | Sequence[int] = "auto",
        strategy: str = "auto",
        precision: str = "32-true",
        checkpoint_dir: str | Path | None = None,
        ckpt_path: str | Path | None = None,
        progress_bar: bool = True,
        seed: int | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        **trainer_arguments: Any,
    ) -> "SCANVI":
        """Train, or train on.

        Two runs with the same seed on one machine, with one number of threads, are equal bit for
        bit. The threads are those that torch was told (OMP_NUM_THREADS, MKL_NUM_THREADS or
        ``torch.set_num_threads``), also where numba, which scanpy calls, has raised them; what was
        found is put back at the end. Ctrl-C ends training early and keeps what was learned.
        Numbers may be numpy's.

        Parameters
        ----------
        max_epochs
            Passes over the data; None is ``min(round(20000 / n_cells * 400), 150)``.
        n_samples_per_label
            At most so many cells of each label, drawn anew in each epoch, count in the
            classification term; None is all. The ELBO sees every cell.
        pretrain_epochs
            Passes before those, without labels: encoder and decoder are trained as scVI, which is
            a warm start. The history calls them "pretrain"; callbacks see the rest only.
        train_size, validation_size
            Shares of the cells to train on and to score; a `validation_size` of None is the rest.
        batch_size
            Cells in a minibatch, of each process where several train.
        class_balanced
            Draw labelled cells so that each label is seen equally often, by the ELBO too. For rare
            types; the classifier's probabilities are then those of equally frequent types.
        cell_weights
            Weight of each cell in the objective, positive: numbers or a column of obs. A weight of
            2 is as if the cell were there twice; they are scaled to a mean of 1.
        early_stopping, early_stopping_patience
            Stop when the ELBO of the held-out cells has not risen for so many epochs, or at the
            first scoring after them.
        check_val_every_n_epoch
            Score the held-out cells every so many epochs.
        plan_kwargs
            Fields of :class:`~pyro_scanvi.training.settings.Plan`: learning rate, optimiser, KL
            warm-up, ...
        objective
            What is minimised. None is ``Layered()``: the latent space is learned as in scVI, and
            types upon it, so that labelled cells lie among their kind. ``ELBO()`` is the paper's,
            and the one for a prior or a guide of one's own: all of the story shapes the latent
            space, with few labels so much that labelled cells lie on islands. With settings,
            ``ELBO(num_particles=5)``; an importance-weighted bound, ``IWAE()``; a loss of Pyro,
            ``PyroLoss(...)``; or one of one's own: called with the module and the plan, it gives
            what has ``parts(cells)`` and ``kl_weight``; see
            :class:`~pyro_scanvi.model.objectives.Objective`. Held-out cells are
            scored by it too, and `elbo` in the history is the bound that is trained; a warm start
            keeps its own. ``training_settings`` and checkpoints tell it as text.
        callbacks, logger
            Lightning's, beside our own; lists, or for the logger one.
        accelerator, devices, precision
            As for Lightning's Trainer: one device, or those of `strategy`; "32-true", "64-true" or
            "bf16-mixed".
        strategy
            "auto" is one process; "ddp" is Lightning's, in as many as torchrun or srun has started
            (docs/many_machines.md), each of which calls this with the same cells and arguments.
            Ctrl-C then ends all of them with an error.
        checkpoint_dir
            Folder to keep ``last.ckpt`` in, the state after the last epoch that was trained whole.
            One that is there is not replaced by a fresh start.
        ckpt_path
            Go on from such a file. Make the model and call this with the arguments that it was
            started with, on as many threads: it ends as if it had never stopped, bit for bit. Only
            `max_epochs` may be larger; a run that early stopping has ended stays as it is. "last"
            is the file in `checkpoint_dir` if there is one, so that a script can be started again
            as it is. No pickle is executed.
        progress_bar
            Show one.
        seed
            Of shuffling, dropout and sampling; None is the model's own. The split is always that
            of the model's seed, so that training on with the same shares never sees held-out
            cells.
        trainer_kwargs, **trainer_arguments
            Further arguments of Lightning's Trainer, such as ``max_time``, in a dict or by
            themselves; ``enable_progress_bar`` is `progress_bar`. Each phase, the warm start and
            the training, has a Trainer of its own.

        Raises
        ------
        InputError, TypeError
            For arguments that make no sense, such as early stopping by cells that are never
            scored; nothing is computed then. An objective is tried on a few cells first.
        NonFiniteError
            If a loss or gradient is not finite: it names the site, the genes and the cells. The
            model keeps the last weights for which both were.

        Warns
        -----
        UserWarning
            If Ctrl-C was pressed; or after the first epoch, if there are more than 5,000 genes and
            the epochs to come will take more than two minutes.
        """
        check_flags(early_stopping=early_stopping)
        given = trainer_arguments, trainer_kwargs, progress_bar
        trainer_kwargs, progress_bar = scvi_names.trainer_arguments(
            SCANVI.train, PLAN_SETTINGS, free_arguments(), *given
        )
        default_epochs = default_max_epochs(len(self._data))
        data_settings = DataSettings(
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
        where = accelerator, devices, strategy, precision
        trainer_settings = TrainerSettings(
            callbacks, logger, *where, checkpoint_dir, progress_bar, trainer_kwargs
        )
        plan = Plan.of(plan_kwargs or {}, Layered() if objective is None else objective)
        self._fit(plan, data_settings, trainer_settings, cell_weights, ckpt_path)
        return self

    def _fit(
        self,
        plan: Plan,
        data_settings: DataSettings,
        trainer_settings: TrainerSettings,
        cell_weights: str | Sequence[float] | None,
        ckpt_path: str | Path | None,
    ) -> None:
        self._check_adata(labels=True)
        data = replace(self._data, weight=weights_of(self.adata, cell_weights))
        rows = self.history.to_dict("records")
        guards = freezing.callbacks(self.module, self.freeze)
        try:
            runs.fit(
                self.module, data, plan, data_settings, trainer_settings, rows, ckpt_path, guards
            )
        except NonFiniteError as error:
            error.name(self.adata.obs_names, self.fields.columns())
            raise
        finally:  # what was learned before an error is kept, and told
            self.history = History(rows)
            self.is_trained |= runs.has_learned_labels(rows)
        self.training_settings = plan.record() | asdict(data_settings)
        if self.freeze is None or not self.freeze.keeps_latent:  # else those of before still hold
            self.rules = Rules(honest=self.rules.honest and plan.hides_labels)

    @property
    def n_epochs_trained(self) -> int:
        """Number of epochs in the history."""
        return runs.epochs_in(self.history.to_dict("records"))

    # What users of scvi-tools know, each in a line or two; scvi_tools/names.py knows the rest.

    def __getattr__(self, name: str) -> Any:
        raise scvi_names.missing(type(self).__name__, name)

    def __repr__(self) -> str:
        return summary.description(self, self._data)

    @property
    def summary_string(self) -> str:
        """What ``print(model)`` prints."""
        return repr(self)

    def view_anndata_setup(self, adata: ad.AnnData | None = None) -> pd.DataFrame:
        """What the model reads of an AnnData: place, number of categories, the first of them.

        Parameters
        ----------
        adata
            Another AnnData that was set up; None is the setup of the model.
        """
        return summary.setup_table(self.fields if adata is None else Fields.from_uns(adata))

    def get_var_names(self) -> np.ndarray:
        """Names of the genes that the model reads, in its order."""
        return self.fields.genes.copy()

    @property
    def device(self) -> torch.device:
        """Where the weights are; cells are moved there minibatch by minibatch."""
        return self.module.y_prior.device

    def to_device(self, device: str | int | torch.device) -> None:
        """Move the weights, as to "cuda" or "cpu"; a number is a GPU. For asking: training moves
        them by itself, see `accelerator` of :meth:`train`.

        Raises
        ------
        InputError
            If there is no such device.
        """
        try:
            self.module.to(torch.device(device))
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device={device!r} cannot be used: {error}") from None

    @property
    def train_indices(self) -> np.ndarray:
        """Positions of the cells that :meth:`train` was last called to train on."""
        return self._split()[0]

    @property
    def validation_indices(self) -> np.ndarray:
        """Positions of the cells that it scored."""
        return self._split()[1]

    @property
    def test_indices(self) -> np.ndarray:
        """Positions of the cells that it did neither with."""
        return np.setdiff1d(np.arange(len(self._data)), np.concatenate(self._split()))

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        settings = self.training_settings
        if not settings:
            raise AttributeError  # Python then asks __getattr__, which knows what to say
        shares = settings["train_size"], settings["split_seed"], settings["validation_size"]
        return split(self._data.label, *shares)

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
        fields = _fields_of(reference)
        if return_reference_var_names:
            return pd.Index(fields.genes)
        return query.prepare(adata, fields)

    @classmethod
    @plain_arguments
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
        module_class: type[SCANVAE] = SCANVAE,
        parts: Mapping[str, Any] | None = None,
    ) -> "SCANVI":
        """A model of new cells that holds the weights of a trained reference (scArches).

        Batches and covariate categories that the reference has not seen become new ones. They
        start as an average old one (see :mod:`pyro_scanvi.surgery.growing`), so the model can
        predict at once; cells of old categories get the outputs of the reference. :meth:`train`
        then moves, of all weights:

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
            ``freeze_classifier=False, freeze_expression=False`` it is learned better. Label some
            cells of known types too: nothing else tells the new type from them.
        extend_categories
            False: an unseen batch or category is an error.
        seed
            Of later training; None is that of the reference.
        module_class, parts
            The class and the parts of one's own that a saved reference was made with, as in
            :meth:`load`; a model knows its own.

        Raises
        ------
        InputError
            If the reference is none, genes or columns are missing, labels are unknown and not
            among `extend_labels` or those clash with known ones, the labels have groups or a
            confusion matrix while some are new, or a parameter of one's own depends on the number
            of categories and does not say how (:func:`pyro_scanvi.model.growth.grows`).

        Warns
        -----
        UserWarning
            If a label of `extend_labels` labels no cell, or the cells do not look like those of any
            label of the reference.

        References
        ----------
        Lotfollahi et al. (2022), Nat Biotechnol 40:121.
        """
        source = _as_reference(reference, module_class, parts)
        seed = source.seed if seed is None else seed
        check_seed(seed)
        check_flags(extend_categories=extend_categories)
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
        with fields.noted(adata):
            model = cls(adata, seed, type(source.vae), **_explicit(arguments))
            growing.grow(source.vae, model.module)
        model.is_trained = source.is_trained
        model.freeze = freezing.frozen(source.vae, model.module, **flags)
        is_same = len(fields.classes) == len(source.fields.classes)  # new labels have no rule
        known = source.consensus
        model.rules = Rules(known if is_same else None, honest=known is not None)
        if known is not None:  # said of the line above the check of arguments
            warn_of_strangers(known, model._data.counts, stacklevel=3)
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
        own = None if isinstance(reference, SCANVI) else parts_in(self.vae_arguments)
        source = _as_reference(reference, type(self.module), own)
        query.check_grown(source.fields, self.fields)
        return pd.DataFrame(freezing.state_diff(self.module, source.vae, self.freeze))

    def annotate(self, adata: ad.AnnData | None = None) -> ad.AnnData:
        """Write predictions and latent space into an AnnData; None is the training data.

        Adds ``obs["scanvi_prediction"]``, ``obs["scanvi_confidence"]`` (probability of the
        predicted label), ``obsm["scanvi_probabilities"]`` (a DataFrame, one column a class),
        ``obsm["X_scanvi"]``, and to ``uns["pyro_scanvi"]`` version, settings, seed and final
        losses (nats per cell).

        All of it can be written by ``write_h5ad`` and ``write_zarr``. Columns of a file cannot
        have every name, so a class may be called otherwise there, such as "CD4|CD8 T" for
        "CD4/CD8 T"; ``uns["pyro_scanvi"]["setup"]["classes"]`` holds the labels in the order of
        the columns. Settings that are None are text.

        Raises
        ------
        InputError
            If the model was never trained, or the cells do not fit it.

        Warns
        -----
        UserWarning
            If a column is called otherwise than its class, or the index of ``obs`` had the name
            of a column that is written, which it loses.
        """
        soft = self.predict(adata, soft=True)
        latent = self.get_latent_representation(adata, seed=self.seed)
        adata = self.adata if adata is None else adata
        predicted = self.fields.classes[soft.to_numpy().argmax(1)]
        adata.obs["scanvi_prediction"] = pd.Categorical(predicted, categories=self.fields.classes)
        adata.obs["scanvi_confidence"] = soft.max(axis=1)
        if adata.obs_names.name in WRITTEN:
            adata.obs_names = adata.obs_names.rename(None)
            warnings.warn("the index of obs had the name of a column, and lost it", stacklevel=2)
        names = [str(name) for name in self.fields.classes]
        soft.index = adata.obs_names
        soft.columns = storable_names(names, taken=[str(soft.index.name)])
        renamed = [f"{n!r} is {c!r}" for n, c in zip(names, soft.columns, strict=True) if n != c]
        if renamed:
            message = "a file takes other names of columns in obsm['scanvi_probabilities']"
            warnings.warn(message + first(renamed), stacklevel=2)
        adata.obsm["scanvi_probabilities"] = soft
        adata.obsm["X_scanvi"] = latent
        adata.uns[UNS_KEY] = {"setup": self.fields.to_uns()} | self._record()
        return adata

    def save(
        self,
        directory: str | Path,
        overwrite: bool = False,
        save_anndata: bool = False,
        card: str = "",
    ) -> None:
        """Write the model into a folder, whole or not at all: safetensors and JSON, no pickle.

        Of several processes that have trained it, the first writes, and in the others the call
        does nothing.

        Parameters
        ----------
        directory
            A folder that does not exist yet; those above it are made too.
        overwrite
            Replace a model that was saved there.
        save_anndata
            Write the training data too, for :meth:`load` without an AnnData: the AnnData as it
            is, but with the counts that the model was made with where they have changed since.
        card
            A text for people, written beside as ``README.md``; nothing reads it. Those of the
            Hugging Face hub are made by :func:`pyro_scanvi.estimator.hub.to_hub_folder`.

        Raises
        ------
        InputError
            If the folder exists or cannot be written, or the cells of the AnnData to save are no
            longer those of the model.

        Notes
        -----
        Of a class and of parts of one's own, such as a likelihood, the name is written and no
        code; :meth:`load` is given them.
        """
        if not is_first():
            return
        directory = user_path(directory)
        models.check_target(directory, overwrite)
        saved = Saved(
            state=self.module.state_dict(),
            fields=self.fields,
            arguments=without_parts(self.vae_arguments),
            parts=names_of_parts(self.vae_arguments),
            seed=self.seed,
            is_trained=self.is_trained,
            freeze=self.freeze,
            history=self.history,
            training_settings=self.training_settings,
            module_class=type(self.module).__qualname__,
            cells=self._training_anndata() if save_anndata else None,
            consensus=self.consensus() if self.label_method == CONSENSUS else None,
        )
        saved.write(directory, overwrite, card)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        adata: ad.AnnData | None = None,
        module_class: type[SCANVAE] = SCANVAE,
        parts: Mapping[str, Any] | None = None,
    ) -> "SCANVI":
        """Open a model that :meth:`save` wrote; its predictions are equal to the bit.

        Parameters
        ----------
        directory
            The folder.
        adata
            Cells with the genes and categories of the training data; None is the AnnData that was
            saved with the model.
        module_class
            The class that the model was made with: a folder holds weights, and no code.
        parts
            The parts of one's own that it was made with, by argument: ``{"gene_likelihood":
            negative_binomial, "extra_encoder_kwargs.activation": nn.GELU}``. The folder knows
            their names, and nothing is imported by them.

        Raises
        ------
        InputError
            If the folder is damaged, holds no AnnData while none is given, or the AnnData differs
            from what the model knows; it says in what. If `module_class` or one of `parts` has
            another name, or is missing; it says which.
        """
        saved = Saved.read(directory, with_cells=adata is None).with_parts(parts)
        saved.check_class(module_class)
        adata = saved.cells if adata is None else adata
        with saved.fields.noted(adata):
            model = cls(adata, saved.seed, module_class, **_explicit(saved.arguments))
            model.module.load_state_dict(saved.state)
        model.history, model.training_settings = saved.history, saved.training_settings
        model.is_trained, model.freeze = saved.is_trained, saved.freeze
        honest = saved.consensus is not None or not saved.is_trained
        model.rules = Rules(
            saved.consensus, honest, fingerprint(model.module) if saved.freeze is None else None
        )
        if saved.freeze is not None:
            freezing.hold(model.module, saved.freeze)
        return model

    def _training_anndata(self) -> ad.AnnData:
        """The AnnData with the counts that the model was made with."""
        self._check_adata(labels=True)
        self._data.check_in_memory("save_anndata=True", "leave it out, and give SCANVI.load adata")
        if self.fields.holds(self.adata, self._data):
            return self.adata
        warnings.warn(
            f"the counts in {self.fields.place}, or other data that the model reads, have changed "
            "since the model was made; those that it was made with are saved in their place",
            stacklevel=3,
        )
        return self.fields.with_data(self.adata, self._data)

    def _record(self) -> dict[str, Any]:
        """What was done, as a plain dict."""
        last = self.history.groupby("split").last() if len(self.history) else pd.DataFrame()
        losses = {s: row.drop("epoch").dropna().to_dict() for s, row in last.iterrows()}
        names = {place: name_of_part(p) for place, p in parts_in(self.vae_arguments).items()}
        return {
            "version": version("pyro-scanvi"),
            "seed": self.seed,
            "n_epochs": self.n_epochs_trained,
            "settings": {
                "model": {k: str(v) for k, v in with_parts(self.vae_arguments, names).items()},
                "training": storable(self.training_settings),
            },
            "final_losses": storable(losses),
        }

    def _given_by_data(self) -> dict[str, Any]:
        """Sizes, and the prior of a latent library."""
        sizes = self.fields.sizes()
        if self.vae_arguments.get("use_observed_lib_size", True):
            return sizes
        means, variances = library_prior(self._data, sizes["n_batch"])
        return sizes | {"library_log_means": means, "library_log_vars": variances}

    @property
    def label_method(self) -> str:
        """How :meth:`predict` finds labels unless it is told."""
        there = self.rules.of(self.module) is not None or self._can_learn_rules()
        return CONSENSUS if self.is_trained and there else CLASSIFIER

    def consensus(self) -> Consensus:
        """The label rules of the labelled cells, learned anew where the weights have moved."""
        self._check_trained()
        learned = self.rules.of(self.module)
        if learned is not None:
            return learned
        if not self._can_learn_rules():
            raise InputError(
                "there are no label rules: they are learned from cells whose labels are exact, of "
                "one annotator who does not err, at least one cell of each label and two of two, "
                "and in a latent space that labels have not shaped, as by the default objective of "
                "train; ask the model itself, predict(method='classifier')"
            )
        chosen = labelled_cells(self._data.label, self.seed)
        data = self._data.subset(chosen)
        with seeded(self.seed):  # of a guide without a mean it is drawn
            latent = latent_points(self.module, data, minibatch_size(None)).astype(np.float64)
        found = fit_consensus(data.counts, latent, data.label, self.seed)
        self.rules = Rules(found, weights=fingerprint(self.module))
        return found

    def _can_learn_rules(self) -> bool:
        """Whether labels are exact and of all classes, and the classifier is no part of one's own.

        Who gives another q(y | z) asks for its answers.
        """
        data, vae = self._data, self.module
        exact = data.evidence is None and data.annotations is None and vae.label_noise.is_exact
        count = np.bincount(data.label[data.label != UNLABELED], minlength=vae.n_labels)
        enough = (count > 0).all() and (count > 1).sum() > 1  # so that two are left in any fold
        return self.rules.honest and exact and bool(enough) and type(vae).q_y is SCANVAE.q_y

    def encoded(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | None,
        labels: bool = True,
        covariates: bool = True,
        extra: bool = True,
    ) -> tuple[CellData, pd.Index]:
        """What a question reads of some cells, and their names; None is the training data, all.

        Each question comes by here, so this is where a model that was never trained is refused.
        `labels`, `covariates` (with batch and size factors) and `extra` say whether it reads those.
        """
        self._check_trained()
        if adata is None:
            self._check_adata(labels)
            data, names = self._data, self._cells
        else:
            data, names = self.fields.encode(adata, labels, covariates, extra), adata.obs_names
        if indices is None:
            return data, names
        positions = np.arange(len(data))[np.asarray(indices, dtype=None if len(indices) else int)]
        if not len(positions):
            raise InputError("indices selects no cell; give the positions of some")
        return data.subset(positions), names[positions]

    def _check_trained(self) -> None:
        if not self.is_trained:
            raise InputError(
                "this model is not trained, so its answers would be random; call model.train() "
                "first, or open a trained one with SCANVI.load(folder). If the weights are meant "
                "as they are, say so: model.is_trained = True"
            )

    def _check_adata(self, labels: bool) -> None:
        """Refuse where the cells, or the labels that are read, are no longer those of the model.

        Its counts and covariates are a copy; what else stands in obs is read where it is.
        """
        now = self.adata.obs_names
        if not now.equals(self._cells):
            raise InputError(
                f"the AnnData has changed since the model was made: it had {len(self._cells)} "
                f"cells, now it has {len(now)}{'' if len(now) != len(self._cells) else ' others'}; "
                "ask about it as it is now by giving it (model.predict(adata)), make the model "
                "anew, or filter a copy (adata[cells].copy()) next time"
            )
        if labels:
            self.fields.check_labels_unchanged(self.adata, self._data)


@dataclass(frozen=True)
class Rules:
    """The label rules of a model, and what they were learned with.

    Attributes
    ----------
    consensus
        The rules; None until they are learned.
    honest
        Whether they can be learned: labels have not shaped the latent space, so that what is held
        out from the rules tells how good they are.
    weights
        Fingerprint of the weights; None of a query, whose frozen weights the rules rest on.
    """

    consensus: Consensus | None = None
    honest: bool = True
    weights: str | None = None

    def of(self, vae: SCANVAE) -> Consensus | None:
        """The rules, if they were learned with these weights."""
        return self.consensus if self.weights in (None, fingerprint(vae)) else None


def fingerprint(vae: SCANVAE) -> str:
    """Of all weights, wherever they are; it tells those that were trained by other means too."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in vae.state_dict().values():
        plain_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(plain_bytes.numpy().tobytes())
    return hashed.hexdigest()


def _explicit(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a SCANVAE that the data do not give; its own defaults, not ours."""
    parameters = inspect.signature(SCANVAE).parameters
    own = {name: parameters[name].default for name in DEFAULTS}
    return own | {k: v for k, v in arguments.items() if k not in FROM_DATA}


def _as_reference(
    reference: SCANVI | str | Path, module_class: type[SCANVAE], parts: Mapping[str, Any] | None
) -> query.Reference:
    """What a query needs of a model, or of the folder of one of that class with those parts."""
    if not isinstance(reference, SCANVI):
        return _saved(reference).with_parts(parts).reference(module_class)
    return query.Reference(
        reference.module,
        reference.fields,
        reference.vae_arguments,
        reference.seed,
        reference.is_trained,
        reference.consensus() if reference.label_method == CONSENSUS else None,
    )


def _fields_of(reference: SCANVI | str | Path) -> Fields:
    """Its columns and categories; of a folder too, whatever the class of its module."""
    return reference.fields if isinstance(reference, SCANVI) else _saved(reference).fields


def _saved(reference: str | Path) -> Saved:
    if isinstance(reference, str | Path):
        return Saved.read(reference)
    raise InputError(
        f"the reference is a {type(reference).__name__}, expected a SCANVI or the folder of one"
    )

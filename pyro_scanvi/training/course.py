"""How training goes through the data: epochs, split, minibatches, who is seen how often."""

from dataclasses import dataclass

from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_flags,
    check_seed,
    is_number,
    make_plain,
)


@dataclass(frozen=True)
class Course:
    """How training goes through the data.

    Attributes
    ----------
    max_epochs
        Passes over the data.
    pretrain_epochs
        Passes before them without labels; see :mod:`pyro_scanvi.model.unsupervised`.
    train_size, validation_size
        Shares of the cells to train on and to score; a `validation_size` of None is the rest.
    batch_size
        Cells in a minibatch.
    n_samples_per_label
        At most so many cells of each label, drawn anew in each epoch, count in the classification
        term; None is all.
    class_balanced
        Draw labelled cells so that each label is seen equally often.
    early_stopping
        Stop when the held-out ELBO has not risen for so many epochs, or at the first scoring
        after them; None is never.
    check_val_every_n_epoch
        Score the held-out cells every so many epochs.
    seed
        Of shuffling, dropout and sampling.
    split_seed
        Of the split into cells to train on and cells to score.
    """

    max_epochs: int
    pretrain_epochs: int = 0
    train_size: float = 0.9
    validation_size: float | None = None
    batch_size: int = 128
    n_samples_per_label: int | None = None
    class_balanced: bool = False
    early_stopping: int | None = None
    check_val_every_n_epoch: int = 1
    seed: int = 0
    split_seed: int = 0

    def __post_init__(self):
        make_plain(self)
        check_seed(self.seed)
        check_at_least(0, max_epochs=self.max_epochs, pretrain_epochs=self.pretrain_epochs)
        check_at_least(
            1, batch_size=self.batch_size, check_val_every_n_epoch=self.check_val_every_n_epoch
        )
        if self.n_samples_per_label is not None:
            check_at_least(1, n_samples_per_label=self.n_samples_per_label)
        if self.early_stopping is not None:
            check_at_least(0, early_stopping_patience=self.early_stopping)
        check_flags(class_balanced=self.class_balanced)
        if not (is_number(self.train_size) and 0 < self.train_size <= 1):
            raise InputError(f"train_size={self.train_size!r}, expected a share in (0, 1]")
        held_out, most = self.validation_size, 1 - self.train_size
        if held_out is not None and not (is_number(held_out) and 0 <= held_out <= most + 1e-9):
            raise InputError(
                f"validation_size={held_out!r}, expected a share of at most 1 - train_size = "
                f"{most:.6g}"
            )

    @property
    def early_stopping_scorings(self) -> int | None:
        """After how many scorings without a rise the patience is over; they may be seldom."""
        if self.early_stopping is None:
            return None
        return -(-self.early_stopping // self.check_val_every_n_epoch)

    @property
    def scores(self) -> bool:
        """Whether held-out cells are ever scored; of no epochs none could be."""
        return not 0 < self.max_epochs < self.check_val_every_n_epoch


def default_max_epochs(n_cells: int) -> int:
    """scvi-tools' 400, fewer above 20,000 cells, but 150 at most: learning by heart takes time."""
    return max(1, min(round(20_000 / n_cells * 400), 150))

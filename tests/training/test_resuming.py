"""A run that was killed and resumed ends as if it had never stopped, bit for bit."""

import os
import pickle
import signal
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from scipy.sparse import csr_matrix

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.data.minibatches import CellData, Named
from pyro_scanvi.training import checkpoints
from pyro_scanvi.training.checkpoints import digest
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.runs import fit
from pyro_scanvi.training.settings import DataSettings, Plan, TrainerSettings
from tests.examples import SMALL, file_limit, simulated, small_model

pytestmark = pytest.mark.slow  # each trains more than once

N, EPOCHS = 90, 4  # three minibatches an epoch
QUERY = {"batch_size": 16, "progress_bar": False, "plan_kwargs": {"weight_decay": 0.1}}
SETTINGS = {
    "plain": {},
    "everything": {
        "pretrain_epochs": 2,
        "n_samples_per_label": 5,
        "class_balanced": True,
        "early_stopping": True,
        "early_stopping_patience": 2,
        "plan_kwargs": {
            "reduce_lr_on_plateau": True,
            "lr_patience": 0,
            "lr_threshold": 1e6,
            "n_steps_kl_warmup": 9,
            "optimizer": "AdamW",
        },
    },
    "seldom scored": {"class_balanced": True, "check_val_every_n_epoch": 2},
}


class Stop(Exception):
    """In place of a kill, where a new process would take too long."""


def fresh(**arguments):
    return small_model(simulated(N), **({"seed": 2, "dropout_rate": 0.3} | arguments))


def run(settings, folder=None, epochs=EPOCHS, **more):
    arguments = {"batch_size": 32, "progress_bar": False, "checkpoint_dir": folder} | settings
    return fresh().train(epochs, **(arguments | more))


@cache
def whole(name="plain", epochs=EPOCHS, **more):
    """The run that nothing stops; the tests only read it."""
    return run(SETTINGS[name], epochs=epochs, **more)


def run_and_kill(name, folder, epoch):
    """SIGKILL in the second minibatch of an epoch."""

    def kill(module, outputs, cells, i):
        if module.epoch == epoch and i == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    LightningObjective.on_train_batch_end = kill
    run(SETTINGS[name], folder)


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """The checkpoint of a run that stops in the second minibatch of an epoch."""

    def checkpoint(settings, epoch):
        def stop(module, outputs, cells, i):
            if module.epoch == epoch and i == 1:
                raise Stop

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(LightningObjective, "on_train_batch_end", stop)
            run(settings, tmp_path)
        return tmp_path / "last.ckpt"

    return checkpoint


def assert_equal(model, other):
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, other.module.state_dict()[name]), name
    pd.testing.assert_frame_equal(model.history, other.history, check_exact=True)
    assert (model.predict(soft=True) == other.predict(soft=True)).all(axis=None)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_killed_and_resumed(tmp_path, name, new_process):
    """In the middle of an epoch, in another process."""
    epoch = 3 + SETTINGS[name].get("pretrain_epochs", 0)
    assert new_process(run_and_kill, name, tmp_path, epoch) == -signal.SIGKILL
    resumed = run(SETTINGS[name], tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.n_epochs_trained > epoch
    assert_equal(resumed, whole(name))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_stopped_and_resumed(stopped, name, epoch):
    """In either phase, before and after a validation, and in the last epoch of some."""
    path = stopped(SETTINGS[name] | {"early_stopping": False}, epoch)
    if not (name == "everything" and epoch == 2):  # then it is the last of the first phase
        assert torch.load(path)["pyro_scanvi"]["history"][-1]["epoch"] == epoch - 1
    resumed = run(SETTINGS[name], early_stopping=False, ckpt_path=path)
    assert_equal(resumed, whole(name, early_stopping=False))


def test_a_second_training_is_resumed(stopped, tmp_path):
    """Epochs of the first call are in the checkpoint; a fresh model goes on from it."""

    def twice(**more):
        model = fresh().train(2, batch_size=32, progress_bar=False)
        return model.train(3, batch_size=32, progress_bar=False, **more)

    expected = twice(checkpoint_dir=tmp_path)
    arguments = {"batch_size": 32, "progress_bar": False, "ckpt_path": tmp_path / "last.ckpt"}
    resumed = fresh().train(3, **arguments)
    assert resumed.n_epochs_trained == 5
    assert_equal(resumed, expected)


def test_a_finished_run_goes_on(tmp_path):
    """More epochs than before: as if they had been asked for at once."""
    run({}, tmp_path, epochs=2)
    assert_equal(run({}, epochs=4, ckpt_path=tmp_path / "last.ckpt"), whole(epochs=4))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    finished = run({}, tmp_path)
    assert_equal(run({}, ckpt_path=tmp_path / "last.ckpt"), finished)


STOPPED = {
    "ours": lambda: {"early_stopping": True, "early_stopping_patience": 2},
    "the user's": lambda: {"callbacks": [EarlyStopping("elbo_train", mode="max", patience=2)]},
    "at a threshold in the first epoch": lambda: {
        "callbacks": [EarlyStopping("elbo_train", mode="max", stopping_threshold=-1e9)]
    },
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_stopped_early_is_left_as_it_is(tmp_path, name):
    """However often the same script is started again, and with more epochs too."""
    still = {"plan_kwargs": {"lr": 0.0}}
    whole = run(still, tmp_path, epochs=40, **STOPPED[name]())
    assert whole.n_epochs_trained < 40
    for epochs in (40, 40, 50):
        again = run(still, tmp_path, epochs=epochs, ckpt_path="last", **STOPPED[name]())
        assert_equal(again, whole)


def test_early_stopping_goes_on_where_it_was_not_over(tmp_path):
    """The patience that was used up before a stop counts after it."""
    settings = {"early_stopping": True, "early_stopping_patience": 3, "plan_kwargs": {"lr": 0.0}}
    whole = run(settings, epochs=40)
    last = whole.n_epochs_trained
    run(settings, tmp_path, epochs=last - 1)
    assert_equal(run(settings, epochs=40, ckpt_path=tmp_path / "last.ckpt"), whole)


@pytest.mark.parametrize(
    "hook, pretrain_epochs",
    [
        ("on_train_epoch_start", 0),
        ("on_train_batch_start", 0),
        ("on_train_batch_end", 0),
        ("on_train_batch_end", 1),
        ("on_validation_batch_end", 0),
        ("on_train_epoch_end", 0),
    ],
)
def test_a_run_that_was_told_to_stop_is_resumed(tmp_path, hook, pretrain_epochs):
    """As by Ctrl-C or max_time, in the middle of an epoch: that epoch is trained again, whole."""
    settings = {"pretrain_epochs": pretrain_epochs}

    def stop(trainer, *arguments):
        trainer.should_stop |= trainer.current_epoch == 1

    first = run(settings, tmp_path, callbacks=[LambdaCallback(**{hook: stop})])
    assert first.n_epochs_trained < EPOCHS
    assert_equal(run(settings, tmp_path, ckpt_path="last"), run(settings))


def test_a_run_that_was_told_to_stop_in_its_first_epoch_starts_anew(tmp_path):
    def stop(trainer, *arguments):
        trainer.should_stop = True

    run({}, tmp_path, callbacks=[LambdaCallback(on_train_batch_end=stop)])
    assert not (tmp_path / "last.ckpt").exists()
    assert_equal(run({}, tmp_path, ckpt_path="last"), run({}))


def test_steps_are_not_counted_with_checkpoints(tmp_path):
    """Lightning would take the end of an epoch for its middle."""
    for more in ({"checkpoint_dir": tmp_path}, {"ckpt_path": tmp_path / "last.ckpt"}):
        with pytest.raises(InputError, match="max_steps cannot go with checkpoints"):
            run({}, trainer_kwargs={"max_steps": 100}, **more)


def test_a_query_is_resumed(stopped_query, tmp_path):
    """What is frozen stays so, in the rest of the run too."""
    reference, query = stopped_query
    resumed = query().train(3, **QUERY, checkpoint_dir=tmp_path, ckpt_path="last")
    assert_equal(resumed, query().train(3, **QUERY))
    diff = resumed.state_diff(reference)
    assert diff.changed.sum() == 0 and diff.new.sum() > 0


@pytest.fixture
def stopped_query(tmp_path, monkeypatch):
    """A reference, and a maker of query models; one of them was stopped in its second epoch."""
    adata = simulated(N)
    adata.obs["batch"] = np.repeat(["one", "two", "three"], N // 3)
    is_new = (adata.obs["batch"] == "three").to_numpy()
    seen, new = adata[~is_new].copy(), adata[is_new].copy()
    SCANVI.setup_anndata(seen, "cell_type", "Unknown", batch_key="batch")
    reference = SCANVI(seen, encode_covariates=True, **SMALL).train(1, **QUERY)

    def query():
        return SCANVI.load_query_data(new.copy(), reference, freeze_batchnorm_decoder=True)

    def stop(module, outputs, cells, i):
        if module.epoch == 1:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LightningObjective, "on_train_batch_end", stop)
        query().train(3, **QUERY, checkpoint_dir=tmp_path)
    return reference, query


def test_a_warm_start_of_a_query_moves_nothing_frozen(stopped_query):
    """Weight decay would."""
    reference, query = stopped_query
    model = query().train(0, **QUERY, pretrain_epochs=2)
    assert model.n_epochs_trained == 2
    diff = model.state_diff(reference)
    assert diff.changed.sum() == 0 and diff.new.sum() > 0


def test_last_starts_or_goes_on(tmp_path):
    """The same call, before and after a stop."""
    first = run({}, tmp_path / "new", epochs=2, ckpt_path="last")
    assert first.n_epochs_trained == 2
    assert_equal(run({}, tmp_path / "new", ckpt_path="last"), whole())
    with pytest.raises(InputError, match="needs checkpoint_dir"):
        run({}, ckpt_path="last")


def test_a_checkpoint_is_not_replaced_by_a_fresh_start(tmp_path):
    run({}, tmp_path, epochs=1)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match="a fresh start would replace it"):
        run({}, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_folder_that_takes_no_files_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    model = fresh()
    with pytest.raises(InputError, match="cannot be made"):
        model.train(1, progress_bar=False, checkpoint_dir=tmp_path / "file")
    assert model.history.empty


def test_fewer_epochs_than_were_done(tmp_path):
    run({}, tmp_path, epochs=3)
    with pytest.raises(InputError, match="max_epochs=2, but the checkpoint .* after 3 epochs"):
        run({}, epochs=2, ckpt_path=tmp_path / "last.ckpt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """That of a short run; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    run({}, folder, epochs=1)
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"batch_size": 33}, "batch_size was 32, is 33"),
        ({"plan_kwargs": {"lr": 0.1}}, "lr was 0.001, is 0.1"),
        ({"precision": "64-true"}, "precision was"),
        ({"cell_weights": np.arange(1.0, N + 1)}, "data was"),
        ({"seed": 4}, "seed was 2, is 4"),
        (
            {"trainer_kwargs": {"accumulate_grad_batches": 2}},
            "accumulate_grad_batches was None, is 2",
        ),
    ],
)
def test_another_run_is_refused(checkpoint, change, named):
    """Nothing is trained, nothing is lost."""
    model = fresh()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    arguments = {"batch_size": 32, "progress_bar": False, "ckpt_path": checkpoint} | change
    with pytest.raises(InputError, match=named):
        model.train(2, **arguments)
    assert all(before[k].equal(v) for k, v in model.module.state_dict().items())
    assert model.history.empty


def test_other_threads_are_refused(checkpoint):
    n = torch.get_num_threads()
    torch.set_num_threads(n + 1)
    named = rf"threads was {n}, is {n + 1} \(torch.set_num_threads"
    with pytest.raises(InputError, match=named):
        run({}, ckpt_path=checkpoint)


COLUMNS = [f.name for f in fields(CellData) if f.name not in ("extra", "position")]


@pytest.mark.parametrize("name", COLUMNS)
def test_any_other_data_have_another_digest(name):
    """Each field by the least that it can differ by; the same numbers in another place too."""
    one = np.arange(12.0).reshape(6, 2)
    data = CellData(one, one[:, 0], one[:, 0])
    digests = {digest(data), digest(replace(data, counts=csr_matrix(one)))}
    assert len(digests) == 1
    for other in (one[:, :1], one[:, :1] + 2.0**-40, one[::-1][:, :1], None):
        if name == "counts" and other is not None:
            other = np.hstack([other, one])
        elif name == "counts":
            continue
        digests.add(digest(replace(data, **{name: other})))
    assert len(digests) >= 4


@pytest.mark.parametrize("matrix", [np.asarray, csr_matrix])
def test_extra_data_have_another_digest(matrix):
    """By the least that they can differ by: a number, its column, its name, what is measured."""
    protein = np.arange(12.0).reshape(6, 2)
    others = [protein[:, ::-1], protein + 2.0**-40, np.where(protein == 3, np.nan, protein)]
    named = [{"protein": matrix(p)} for p in (protein, *others)] + [{"spliced": matrix(protein)}]
    found = {digest(replace(DATA, extra=Named(extra))) for extra in (*named, {})}
    assert len(found) == len(named) + 1
    data = replace(DATA, extra=Named(protein=matrix(protein)))
    assert digest(data) == digest(replace(DATA, extra=Named(protein=protein)))
    assert digest(data, "1") == digest(DATA, "1"), "the first rule knows of none"


DATA = CellData(
    counts=np.arange(12, dtype=np.float32).reshape(6, 2),
    batch=np.arange(6) % 2,
    label=np.arange(6) % 3 - 1,
    continuous=np.arange(6, dtype=np.float32)[:, None],
    categorical=np.arange(6)[:, None] % 2,
    size_factor=np.arange(1, 7, dtype=np.float32)[:, None],
    weight=np.array([0.5, 1.0, 1.5, 0.75, 1.25, 1.0], dtype=np.float32),
)
WITH_EVIDENCE = replace(
    DATA,
    evidence=np.log([[0.5, 0.5]] * 3 + [[0.3, 0.7]] * 3).astype(np.float32),
    annotations=np.arange(6)[:, None] % 2,
)
ABSENT = dict.fromkeys(["batch", "continuous", "categorical", "size_factor", "weight"])


@pytest.mark.parametrize(
    "data, expected", [(DATA, "d95d07841b46bc73"), (replace(DATA, **ABSENT), "8a7021d256f41292")]
)
def test_the_first_rule_of_the_digest_stays(data, expected):
    """What version 0.1.0 gave, which did not say by which rule."""
    assert digest(data, "1") == f"1:{expected}"


@pytest.fixture(scope="module")
def of_data(tmp_path_factory):
    """Train a small model on such data, with checkpoints there or from there; the history."""
    folder = tmp_path_factory.mktemp("run")

    def train(data, epochs=2, ckpt_path=folder / "last.ckpt", **more):
        vae = SCANVAE(2, n_labels=2, n_batch=2, n_continuous_cov=1, n_cats_per_cov=[2], n_hidden=4)
        settings = DataSettings(epochs, batch_size=3)
        history = []
        trainer = TrainerSettings(progress_bar=False, **more)
        fit(vae, data, Plan(), settings, trainer, history, ckpt_path)
        return history

    train(WITH_EVIDENCE, 1, ckpt_path=None, checkpoint_dir=folder)
    return train


@pytest.mark.parametrize("name", COLUMNS)
def test_data_that_differ_in_a_field_are_refused(of_data, name):
    """In one cell of it alone, whatever else they share."""
    values = getattr(WITH_EVIDENCE, name).copy()
    values[2] = values[3]
    with pytest.raises(InputError, match=r"another training run: data was '2:\w+', is '2:\w+';"):
        of_data(replace(WITH_EVIDENCE, **{name: values}))
    assert [row["epoch"] for row in of_data(WITH_EVIDENCE) if row["split"] == "train"] == [0, 1]


def first_rule():
    """The fingerprint of the cells by the first rule, without its version."""
    return digest(fresh()._data, "1").removeprefix("1:")


def refuse_other_cells(path, rule="2"):
    other = small_model(simulated(N, seed=1), seed=2, dropout_rate=0.3)
    with pytest.raises(InputError, match=rf"data was '{rule}:\w+', is '{rule}:\w+'"):
        other.train(2, batch_size=32, progress_bar=False, ckpt_path=path)


def rewritten(path, folder, change):
    """A checkpoint with another fingerprint of the data."""
    checkpoint = torch.load(path, weights_only=True)
    identity = checkpoint["pyro_scanvi"]["identity"]
    identity["data"] = change(identity["data"])
    torch.save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_fingerprint_without_a_version_is_of_the_first(checkpoint, tmp_path):
    """As the first checkpoints have it."""
    (tmp_path / "first").mkdir()
    path = rewritten(checkpoint, tmp_path / "first", lambda data: first_rule())
    assert ":" not in torch.load(path)["pyro_scanvi"]["identity"]["data"]
    assert_equal(run({}, epochs=2, ckpt_path=path), whole(epochs=2))
    refuse_other_cells(path, "1")


@pytest.mark.parametrize("prefix", ["1:", ""])
def test_a_later_rule_compares_earlier_checkpoints_by_theirs(
    checkpoint, tmp_path, monkeypatch, prefix
):
    """And writes its own."""
    (tmp_path / "old").mkdir()
    path = rewritten(checkpoint, tmp_path / "old", lambda data: prefix + first_rule())
    monkeypatch.setitem(checkpoints.DIGESTS, "3", lambda data: "another")
    monkeypatch.setattr(checkpoints, "LATEST", "3")
    assert_equal(run({}, tmp_path, epochs=2, ckpt_path=path), whole(epochs=2))
    written = torch.load(tmp_path / "last.ckpt")["pyro_scanvi"]["identity"]["data"]
    assert written == "3:another"
    refuse_other_cells(path, "1")


def test_a_rule_that_is_not_known_yet(checkpoint, tmp_path):
    path = rewritten(checkpoint, tmp_path, lambda data: "4:0123456789abcdef")
    with pytest.raises(InputError, match="written by a later version of pyro_scanvi"):
        run({}, epochs=2, ckpt_path=path)


def test_another_model_and_other_cells_are_refused(checkpoint):
    arguments = {"batch_size": 32, "progress_bar": False, "ckpt_path": checkpoint}
    with pytest.raises(InputError, match=r"weight \S+ was .*, is .*"):
        fresh(n_latent=5).train(2, **arguments)
    with pytest.raises(InputError, match="data was"):
        small_model(simulated(N, seed=1), seed=2).train(2, **arguments)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_are_found(checkpoint, tmp_path, seed):
    """Or lie where the archive holds nothing: then the result is the same."""
    data = bytearray(checkpoint.read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (tmp_path / "last.ckpt").write_bytes(data)
    try:
        resumed = run({}, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    except InputError as error:
        assert "damaged" in str(error) or "no checkpoint" in str(error)
    else:
        assert_equal(resumed, whole(epochs=2))


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_checkpoints_are_found(checkpoint, tmp_path, share):
    data = checkpoint.read_bytes()
    (tmp_path / "last.ckpt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="damaged"):
        run({}, ckpt_path=tmp_path / "last.ckpt")


def test_another_archive_under_the_checksum_of_the_first_is_found(checkpoint, tmp_path):
    """Whose parts all have the right CRC-32."""
    content = torch.load(checkpoint, weights_only=True)
    content["epoch"] += 1
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    comment = 2 + len("pyro_scanvi sha256 ") + 64
    path.write_bytes(path.read_bytes()[:-2] + checkpoint.read_bytes()[-comment:])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged: its checksum is wrong"):
        run({}, ckpt_path=path)


class Evil:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize("dump", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_no_pickle_is_executed(tmp_path, dump):
    dump({"pyro_scanvi": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="no checkpoint of pyro_scanvi|damaged"):
        run({}, ckpt_path=tmp_path / "last.ckpt")


def test_other_checkpoints_and_none(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="no checkpoint of pyro_scanvi"):
        run({}, ckpt_path=tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="there is no checkpoint"):
        run({}, ckpt_path=tmp_path / "none.ckpt")


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """As when the disk is full in the middle of a file."""
    save, left = torch.save, [2]

    def fill_the_disk(checkpoint, file):
        left[0] -= 1
        with file_limit(None if left[0] else 100):
            save(checkpoint, file)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(InputError, match="last.ckpt cannot be written: File too large"):
        run({}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    monkeypatch.undo()
    assert_equal(run({}, ckpt_path=tmp_path / "last.ckpt"), whole())

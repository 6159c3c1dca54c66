"""A model that was never trained does not answer; what counts as trained."""

import json
import signal

import pytest
from lightning.pytorch.callbacks import LambdaCallback

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.storage import models
from tests.examples import QUESTIONS, as_they_are, simulated, small_model

QUIET = {"batch_size": 32, "progress_bar": False}
ASKED = {
    "predict": {},
    "predict_sets": {},
    "get_novelty": {},
    "annotate": {},
    "get_latent_representation": {},
    "get_normalized_expression": {},
    "get_likelihood_parameters": {},
    "get_latent_library_size": {"give_mean": False},
    "posterior_predictive_sample": {},
    "get_feature_correlation_matrix": {},
    "get_elbo": {},
    "get_reconstruction_error": {},
    "get_marginal_ll": {"n_mc_samples": 2},
    "differential_expression": {"groupby": "cell_type", "silent": True, "n_samples_overall": 8},
}


@pytest.fixture
def untrained():
    return small_model(simulated())


def test_every_question_is_asked_below():
    assert set(ASKED) == {*QUESTIONS, "annotate"}
    asked = {name for name in dir(SCANVI) if name.startswith(("get_", "posterior_"))}
    assert asked - set(ASKED) == {"get_var_names"}  # which reads no weights


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("of_new_cells", [False, True])
def test_an_untrained_model_does_not_answer(untrained, name, of_new_cells):
    ask = {"adata": simulated(n=30)} if of_new_cells else {}
    with pytest.raises(InputError, match=r"not trained.*model\.train\(\).*is_trained = True"):
        getattr(untrained, name)(**ask, **ASKED[name])
    assert "scanvi_prediction" not in untrained.adata.obs


@pytest.mark.parametrize("name", ASKED)
def test_it_answers_where_the_weights_are_meant(untrained, name):
    assert getattr(as_they_are(untrained), name)(**ASKED[name]) is not None


def test_training_makes_it_trained(untrained):
    assert untrained.is_trained is False
    assert untrained.train(1, **QUIET).is_trained is True
    assert len(untrained.predict()) == 120


@pytest.mark.parametrize("epochs", [{"max_epochs": 0}, {"max_epochs": 0, "pretrain_epochs": 2}])
def test_a_warm_start_alone_does_not(untrained, epochs):
    """It teaches neither classifier nor the networks of u."""
    assert not untrained.train(**epochs, **QUIET).is_trained


def test_no_epochs_leave_a_trained_model_trained(untrained):
    assert untrained.train(1, **QUIET).train(0, **QUIET).is_trained


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore:interrupted in epoch:UserWarning")
def test_an_interrupted_model_is_trained_by_what_it_learned(untrained):
    stop = LambdaCallback(on_train_batch_end=interrupt)
    untrained.train(5, callbacks=[stop], **QUIET)
    assert untrained.n_epochs_trained == 1 and untrained.is_trained


def test_an_error_before_the_first_step_teaches_nothing(untrained):
    def fail(*_):
        raise RuntimeError("a callback's own")

    with pytest.raises(RuntimeError, match="own"):
        untrained.train(5, callbacks=[LambdaCallback(on_train_start=fail)], **QUIET)
    assert not untrained.is_trained


def test_an_error_in_a_later_epoch_leaves_it_trained(untrained):
    def fail(trainer, _):
        if trainer.current_epoch == 1:
            raise RuntimeError("a callback's own")

    with pytest.raises(RuntimeError, match="own"):
        untrained.train(5, callbacks=[LambdaCallback(on_train_epoch_start=fail)], **QUIET)
    assert untrained.is_trained


def test_resuming_makes_it_trained(untrained, tmp_path):
    """Also where nothing is left to do."""
    small_model(simulated()).train(2, checkpoint_dir=tmp_path, **QUIET)
    untrained.train(2, ckpt_path=tmp_path / "last.ckpt", **QUIET)
    assert untrained.is_trained


@pytest.mark.parametrize("trained", [True, False])
def test_a_save_tells(untrained, tmp_path, trained):
    untrained.is_trained = trained
    untrained.save(tmp_path / "model")
    assert SCANVI.load(tmp_path / "model", simulated()).is_trained is trained
    assert SCANVI.load_query_data(simulated(), tmp_path / "model").is_trained is trained
    assert SCANVI.load_query_data(simulated(), untrained).is_trained is trained


def test_records_that_do_not_tell_are_of_trained_models(untrained, tmp_path):
    """Written before models knew."""
    untrained.save(tmp_path / "model")
    path = tmp_path / "model" / models.RECORD
    record = json.loads(path.read_text())
    del record["is_trained"], record["record_sha256"]
    record["record_sha256"] = models._digest(models._canonical(record))
    path.write_text(json.dumps(record))
    assert SCANVI.load(tmp_path / "model", simulated()).is_trained
    assert SCANVI.load_query_data(simulated(), tmp_path / "model").is_trained


def test_a_query_answers_before_it_is_trained(untrained):
    reference = untrained.train(1, **QUIET)
    assert len(SCANVI.load_query_data(simulated(n=30), reference).predict()) == 30

"""Nothing that a pickle says is executed; arrays come out of it all the same."""

import os
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import InputError
from pyro_scanvi.scvi_tools import pickles
from pyro_scanvi.scvi_tools.saves import read_save


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CALLS = {
    "system": lambda path: _Call(os.system, f"touch {path}"),
    "builtins.eval": lambda path: _Call(eval, f"__import__('os').mkdir({str(path)!r})"),
    "mkdir": lambda path: _Call(os.mkdir, str(path)),
}
FORMATS = {
    "usual": {},
    "protocol 4": {"pickle_protocol": 4},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("settings", FORMATS.values(), ids=list(FORMATS))
def test_no_pickle_is_executed(tmp_path, name, settings):
    trace = tmp_path / "executed"
    saved = {"model_state_dict": {}, "var_names": CALLS[name](trace), "attr_dict": {}}
    torch.save(saved, tmp_path / "model.pt", **settings)
    with pytest.raises(InputError, match="nothing in it was executed") as raised:
        read_save(tmp_path)
    assert settings or name in str(raised.value)
    assert not trace.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # it would have been
    assert trace.exists()


def test_stand_ins_rebuild_arrays_and_nothing_else(tmp_path):
    arrays = {
        "objects": np.array([["a", None], [1, 2.5]], dtype=object),
        "numbers": np.arange(6, dtype=">i4").reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array(["ab", "c"]),
        "empty": np.zeros((0, 2), dtype=bool),
    }
    others = {
        "scalar": np.float64(0.25),
        "table": pd.DataFrame({"loss": [1.0, 2.0]}),
        "time": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "nested": defaultdict(dict, {"a": ({"b": arrays["text"]},)}),
    }
    torch.save(arrays | others, tmp_path / "file.pt")
    found = pickles.read(tmp_path / "file.pt")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert found["scalar"] == 0.25
    assert found["table"] is None and found["time"] is None
    assert found["nested"]["a"][0]["b"].tolist() == ["ab", "c"]


def test_activations_are_known(tmp_path):
    torch.save({"activation": torch.nn.SiLU}, tmp_path / "file.pt")
    assert pickles.read(tmp_path / "file.pt")["activation"] is torch.nn.SiLU


def test_allowed_names(tmp_path):
    torch.save({"layer": torch.nn.Bilinear}, tmp_path / "file.pt")
    name = "torch.nn.modules.linear.Bilinear"
    with pytest.raises(InputError, match=name):
        pickles.read(tmp_path / "file.pt")
    before = set(torch.serialization.get_safe_globals())
    found = pickles.read(tmp_path / "file.pt", allow={name: torch.nn.Bilinear})
    assert found["layer"] is torch.nn.Bilinear
    assert set(torch.serialization.get_safe_globals()) == before

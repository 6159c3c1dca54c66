"""Damaged files, a few of those that ``python -m tests.faults`` reads."""

from pathlib import Path

import pytest

from pyro_scanvi import InputError
from pyro_scanvi.storage import stores
from tests.faults.children import outcomes
from tests.faults.damage import MADE_BY_US, OTHER, READERS, REFUSED, SAME, Trials, make_h5ad

ALLOWED = {REFUSED, SAME}


def check(kind: str, folder: Path, n: int) -> None:
    """None crashes or raises anything but a refusal that names it; ours are never another."""
    found = outcomes(Trials(kind, folder), n, folder / "log")
    assert set(found) <= ALLOWED | (set() if kind in MADE_BY_US else {OTHER}), found
    assert found[REFUSED] > n / 2


@pytest.mark.parametrize("kind", MADE_BY_US)
def test_damage_to_what_we_wrote(tmp_path, new_process, kind):
    assert new_process(check, kind, tmp_path, 40) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_more_damage(tmp_path, new_process, kind):
    n = 500 if kind in MADE_BY_US else 20
    assert new_process(check, kind, tmp_path, n) == 0


@pytest.mark.slow
def test_where_hdf5_runs_in_a_circle(tmp_path, monkeypatch):
    """A heap of texts that is all zeros; it is refused when the time is over."""
    path = make_h5ad(tmp_path)
    whole = path.read_bytes()
    start = whole.index(b"GCOL") + 16
    path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
    monkeypatch.setattr(stores, "PATIENCE", 5)
    with pytest.raises(InputError, match=f"{path} is damaged.*crashes on it, or comes to no end"):
        stores.read_anndata(path)

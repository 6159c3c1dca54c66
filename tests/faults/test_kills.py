"""Kills and full disks, a few of those that ``python -m tests.faults`` tries."""

from pathlib import Path

import pytest

from tests.faults.kills import (
    SURVIVED,
    Killing,
    Writing,
    filled_at_byte,
    sizes,
    steps,
    writings,
)

STRIDES = {
    "a saved model": 9,
    "annotated cells, .h5ad": 40,
    "annotated cells, .zarr": 97,
    "a report": 1,
    "a checkpoint": 7,
}


def check(name: str, folder: Path, stride: int) -> None:
    """Old or new, whole, at every step and at every size; nothing is left by the next."""
    killing = Killing(writings()[name], folder, old=True)
    for found in (steps(killing, stride), sizes(killing, 20), sizes(killing, 20, filled_at_byte)):
        assert found and set(found) <= set(SURVIVED[:2]), found


@pytest.mark.slow
@pytest.mark.parametrize("name", STRIDES)
def test_the_old_one_or_the_new_one_is_there(tmp_path, new_process, name):
    assert new_process(check, name, tmp_path, STRIDES[name]) == 0


def check_the_check(folder: Path) -> None:
    """What writes in place is found out."""

    def write(path: Path, number: int) -> None:
        path.write_text(f"{number}" * 100)

    def read(path: Path) -> int:
        text = path.read_text()
        assert len(text) == 100, "half of it"
        return int(text[0])

    killing = Killing(Writing(write, read, "file"), folder, old=True)
    found = sizes(killing, 5)
    assert not set(found) & set(SURVIVED) and len(found) == 1, found


def test_a_file_that_is_written_in_place_is_found_out(tmp_path, new_process):
    assert new_process(check_the_check, tmp_path) == 0

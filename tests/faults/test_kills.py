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

WRITINGS = (
    "a saved model",
    "annotated cells, .h5ad",
    "annotated cells, .zarr",
    "a report",
    "a checkpoint",
)


def a_few(n: int) -> list[int]:
    """A step in the middle, and the last ones, which move it to its place."""
    return sorted({n // 2, *range(max(0, n - 4), n)})


def check(name: str, folder: Path) -> None:
    """Old or new, whole, at each step and size; the next leaves no trace of the kill."""
    killing = Killing(writings()[name], folder, old=True)
    for found in (
        steps(killing, a_few),
        sizes(killing, 1000),
        sizes(killing, 1000, filled_at_byte),
    ):
        assert found and set(found) <= set(SURVIVED[:2]), found


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITINGS)
def test_the_old_one_or_the_new_one_is_there(tmp_path, new_process, name):
    assert new_process(check, name, tmp_path) == 0


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

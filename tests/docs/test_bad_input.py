"""The page of bad input says what the package says: each mistake is made again."""

import pytest

from tests.scripts import load

bad_input = load("docs/bad_input.py")
CASES = {case.given: case for cases in bad_input.CASES.values() for case in cases}
PAGE = bad_input.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_page_says_what_the_error_says(case):
    """If not, ``python docs/bad_input.py`` writes the page anew."""
    assert bad_input.row(case, bad_input.message(case)) in PAGE.splitlines()


def test_the_page_has_no_other_rows():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) == len(CASES) + len(bad_input.CASES)  # a head for each table
    assert len(CASES) >= 30


def test_the_page_starts_as_the_script_does():
    assert PAGE.startswith(bad_input.HEAD)


def test_a_mistake_that_is_none_is_found():
    with pytest.raises(AssertionError, match="no error: nothing"):
        bad_input.message(bad_input.Case("nothing", lambda: None, ""))

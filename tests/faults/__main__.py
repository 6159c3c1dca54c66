"""What is tried, how often, and what happens: the tables of docs/faults.md."""

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyro_scanvi.storage import stores
from tests.faults.children import outcomes
from tests.faults.configurations import each
from tests.faults.damage import MADE_BY_US, READERS, Trials
from tests.faults.kills import Killing, filled_at_byte, sizes, steps, writings


def damaged(n: int, n_of_others: int) -> Iterable[tuple[str, Counter[str]]]:
    """Files of each kind."""
    stores.PATIENCE = 10  # seconds; they are small
    for kind in READERS:
        with tempfile.TemporaryDirectory() as folder:
            trials, log = Trials(kind, Path(folder)), Path(folder) / "log"
            yield kind, outcomes(trials, n if kind in MADE_BY_US else n_of_others, log)


def killed(stride: int) -> Iterable[tuple[str, Counter[str]]]:
    """Processes that write each thing, over an old one and where there is none."""
    for name, writing in writings().items():
        for old in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                killing = Killing(writing, Path(folder), old)
                place = "over an old one" if old else "where there is none"
                yield (
                    f"{name}, {place}: killed at a step",
                    steps(killing, lambda n: range(0, n, stride)),
                )
                yield f"{name}, {place}: killed at a byte", sizes(killing, 3)
                yield f"{name}, {place}: disk full", sizes(killing, 3, filled_at_byte)


def configured(n: int) -> Iterable[tuple[str, Counter[str]]]:
    """Models and trainings."""
    found: Counter[str] = Counter()
    each(n, lambda outcome: found.update([outcome.partition(":")[0]]))()
    yield "random configurations", found


def told(rows: Iterable[tuple[str, Mapping[str, int]]]) -> None:
    """Print them, as they come."""
    for name, found in rows:
        happened = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(found.items()))
        print(f"| {name} | {sum(found.values()):,} | {happened} |", flush=True)


def main() -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--damaged", type=int, default=0, metavar="N", help="of ours, each kind")
    parser.add_argument("--others", type=int, default=0, metavar="N", help="damaged ones of others")
    parser.add_argument("--configurations", type=int, default=0, metavar="N")
    parser.add_argument("--stride", type=int, default=0, help="kill at each so many steps")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    told(damaged(given.damaged, given.others) if given.damaged else ())
    told(killed(given.stride) if given.stride else ())
    told(configured(given.configurations) if given.configurations else ())


if __name__ == "__main__":
    main()

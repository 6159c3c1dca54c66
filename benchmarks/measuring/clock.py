"""What every timed program does: take its time, and print JSON; without this package too."""

import json
import resource
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version


def epoch_seconds(run: Callable[[int], object], n_epochs: int) -> float:
    """Seconds an epoch, of several after a first one."""
    run(1)
    return seconds(lambda: run(n_epochs)) / n_epochs


def better_of_two(ask: Callable[[], object]) -> float:
    """Seconds, without what only a first call costs."""
    return min(seconds(ask) for _ in range(2))


def seconds(ask: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start


def tell(taken: float, packages: Iterable[str]) -> None:
    """Print seconds, the most memory that the process has held, and versions."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    versions = {name: version(name) for name in packages}
    print(json.dumps({"seconds": taken, "peak_mib": memory, "versions": versions}))

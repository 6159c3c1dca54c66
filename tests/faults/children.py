"""Work in processes of its own, which may be killed or crash."""

import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pyro_scanvi import InputError

MOST_SECONDS = 60  # of the processor, that a child or a trial may take
MOST_MEMORY = 2**33  # bytes that a trial may ask for
WENT_WELL, FAILED, REFUSED = 0, 1, 3  # exit codes; that of a kill is -9
Work = Callable[..., object]


def started(work: Work, *arguments) -> int:
    """Call a function in a child; the number of its process."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            work(*arguments)
            code = WENT_WELL
        except InputError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for its end; the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def exit_code_of(work: Work, *arguments) -> int:
    """Of a function that is called in a child."""
    return ended(started(work, *arguments))


def exit_codes_of(*works: Work) -> list[int]:
    """Of several functions that are called at the same time."""
    gate, key = os.pipe()

    def wait_and(work: Work) -> None:
        os.close(key)
        os.read(gate, 1)  # nothing comes; it ends when all have closed the other end
        work()

    children = [started(wait_and, work) for work in works]
    os.close(key)
    os.close(gate)
    return [ended(child) for child in children]


def as_nobody(work: Work, *arguments) -> None:
    """Root may do anything; so without its rights."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    work(*arguments)


def outcomes(trial: Callable[[int], str], n: int, log: Path) -> Counter[str]:
    """How often each thing came out of trials by number, each noted as a line of `log`.

    They follow one another in a child. Where it dies a trial has "crashed", and another child goes
    on with the next one.
    """
    log.write_text("")
    done = 0
    while done < n:
        code = exit_code_of(_go_on, trial, done, n, log)
        done = len(log.read_text().splitlines())
        if code:
            with log.open("a") as file:
                file.write(f"crashed ({code}) at {done}\n")
            done += 1
    return Counter(line.partition(" at ")[0] for line in log.read_text().splitlines())


def _go_on(trial: Callable[[int], str], start: int, n: int, log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.RLIM_INFINITY))
    with log.open("a", buffering=1) as file:
        for number in range(start, n):
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            file.write(f"{trial(number)}\n")

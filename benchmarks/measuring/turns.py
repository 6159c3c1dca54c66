"""Programs that are timed in turns, each run a process of its own; what they say, and a table."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring.cells import write_cells

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Program:
    """One that is timed: an interpreter, a script of this folder, and how the script runs."""

    name: str
    python: str
    script: str
    way: str = ""

    def run(self, task: str, cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a run of it prints: seconds, peak memory, versions."""
        given = json.dumps(dict(settings) | {"way": self.way})
        threads = str(settings["threads"])
        surroundings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [self.python, str(HERE / self.script), task, str(cells), given]
        ended = subprocess.run(
            command, env=os.environ | surroundings, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            sys.exit(f"{self.name} failed:\n{ended.stderr[-3000:]}")
        return json.loads(ended.stdout.splitlines()[-1])


def measure(
    description: str,
    task: str,
    sizes: Mapping[str, int],
    own: Mapping[str, str],
    others: Mapping[str, str],
    unit: str,
) -> None:
    """A script that times us beside others: a table for each number of threads.

    Parameters
    ----------
    description
        Of the script.
    task
        "train" or "predict".
    sizes
        What may be set, and what it is unless told.
    own, others
        Ways of this package, of which the first is compared with all, and of scvi-tools, by name.
    unit
        Of the times.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--nonzero", type=float, default=0.13, help="share of counts above 0")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peer", help="interpreter with scvi-tools")
    parser.add_argument("--json", type=Path, help="all runs, with versions and machine")
    asked = parser.parse_args()
    settings = {name: getattr(asked, name) for name in (*sizes, "nonzero")}
    rivals, records = programs(asked.peer, own, others), []
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder) / "cells.h5ad"
        write_cells(cells, asked.cells, asked.genes, asked.labels, asked.nonzero)
        for threads in asked.threads:
            here = in_turns(rivals, task, cells, settings | {"threads": threads}, asked.runs)
            print(f"\n{threads} threads, {settings}\n\n{table(here, next(iter(own)), unit)}")
            records += here
    write_json(asked.json, records)


def programs(peer: str | None, own: Mapping[str, str], others: Mapping[str, str]) -> list[Program]:
    """Ours in each way, and where there is an environment with scvi-tools, it in each of its."""
    found = [Program(name, sys.executable, "ours.py", way) for name, way in own.items()]
    if peer is not None:
        found += [Program(name, peer, "scvi_tools.py", way) for name, way in others.items()]
    return found


def in_turns(
    rivals: Iterable[Program], task: str, cells: Path, settings: Mapping[str, Any], n_runs: int
) -> list[dict[str, Any]]:
    """A record of each run; each program once, then each again, so that drifts hit all alike."""
    rivals, records = list(rivals), []
    for k in range(n_runs):
        for rival in rivals:
            said = rival.run(task, cells, settings)
            records.append({"program": rival.name, "run": k} | dict(settings) | said)
            print(f"  {rival.name}: {said['seconds']:.3f} s", file=sys.stderr, flush=True)
    return records


def machine() -> dict[str, str]:
    """What it was measured on."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), ""
    )
    return {"platform": platform.platform(), "processor": model, "cores": str(os.cpu_count())}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def ratios(records: list[dict[str, Any]], ours: str) -> dict[str, tuple[float, float, float]]:
    """Of each other program seconds over ours, run by run: least, median, most."""
    seconds = {name: _seconds(records, name) for name in _names(records)}
    told = {}
    for name, theirs in seconds.items():
        if name != ours:
            pairs = sorted(t / o for t, o in zip(theirs, seconds[ours], strict=True))
            told[name] = pairs[0], statistics.median(pairs), pairs[-1]
    return told


def table(records: list[dict[str, Any]], ours: str, unit: str) -> str:
    """A row of each program: median seconds, the ratio to ours with its range, peak memory."""
    found = ratios(records, ours)
    rows = [f"| program | {unit} | over ours (range) | peak MiB |", "|---|---|---|---|"]
    for name in _names(records):
        seconds = statistics.median(_seconds(records, name))
        least, median, most = found.get(name, (1.0, 1.0, 1.0))
        ratio = "1" if name == ours else f"{median:.2f} ({least:.2f} to {most:.2f})"
        memory = statistics.median(r["peak_mib"] for r in records if r["program"] == name)
        rows.append(f"| {name} | {seconds:.3f} | {ratio} | {memory:.0f} |")
    return "\n".join(rows)


def write_json(path: Path | None, records: list[dict[str, Any]]) -> None:
    """All runs, with the machine."""
    if path is not None:
        told = json.dumps({"machine": machine(), "runs": records}, indent=1)
        path.write_text(told + "\n", encoding="utf-8")


def _names(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["program"] for record in records))


def _seconds(records: list[dict[str, Any]], name: str) -> list[float]:
    return [record["seconds"] for record in records if record["program"] == name]

"""A command at work: what it says and to whom, its errors, and its summary in JSON."""

import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from pyro_scanvi.app.options import Common
from pyro_scanvi.app.parts import versions
from pyro_scanvi.app.report import check_report, write_page
from pyro_scanvi.app.seen import Seen, leak_sentence
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.storage.files import check_new, disk_errors, replacing
from pyro_scanvi.validation import Advice, InputError

STDOUT = Path("-")
complaints = Console(stderr=True)


class Run:
    """A command at work.

    Attributes
    ----------
    common
        Its options that all commands take.
    console
        Where it speaks: stdout, or stderr where stdout is for the summary.
    summary
        What the command has found.
    """

    def __init__(self, context: typer.Context, common: Common):
        self.context, self.common = context, common
        self.console = Console(stderr=common.json == STDOUT)
        self.summary: dict[str, Any] = {}
        self.started = time.monotonic()

    @property
    def progress_bar(self) -> bool:
        """Whether there may be one, on stdout."""
        return self.common.json != STDOUT

    def say(self, message: str) -> None:
        """A line; names and paths in it may hold brackets."""
        _say(message, self.console)

    def check_report(self, report: Path | None, *others: Path) -> None:
        """Refuse a report that cannot be written."""
        if report is not None:
            check_report(report, self.common.overwrite, *others)

    def tell(self, model: SCANVI, report: Path | None) -> None:
        """The report and the figures of a model, where they are asked for."""
        if report is None and self.common.json is None:
            return
        seen = Seen.by(model)
        if report is not None:
            self.say(f"report: {write_page(seen, report, self.common.overwrite)}")
            self.say(leak_sentence(seen.leak()) or "leak of labels: it cannot be told")
        settings = {"model": model.vae_arguments, "training": model.training_settings}
        self.summary |= {"figures": seen.figures(), "settings": settings}

    def write_summary(self) -> None:
        """Where the user asked for one."""
        path = self.common.json
        if path is None:
            return
        record = {
            "command": self.context.command.name,
            "options": self.context.params,
            "seconds": round(time.monotonic() - self.started, 3),
            "versions": versions(),
            **self.summary,
        }
        text = as_json(record)
        if path == STDOUT:
            print(text)
            return
        with disk_errors(path), replacing(path, self.common.overwrite) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        self.say(f"summary: {path}")


@contextmanager
def running(context: typer.Context, common: Common) -> Iterator[Run]:
    """Run a command, and write its summary; what is wrong with the input is a sentence.

    The exit code is then 2. What is our fault keeps its traceback, and has 1.
    """
    run = Run(context, common)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # what libraries will change
        warnings.showwarning = lambda message, *_: _say(
            f"note: {_with_options(message, context)}", complaints, "yellow"
        )
        try:
            _check_summary(common, context)
            yield run
            run.write_summary()
        except InputError as error:
            told = f"{_with_options(error, context)}{_given_by(error, context)}"
            _say(f"error: {told}", complaints, "red")
            sys.exit(2)


def _check_summary(common: Common, context: typer.Context) -> None:
    """Refuse a summary that cannot be written, or that would replace what the command reads."""
    path = common.json
    if path is None or path == STDOUT:
        return
    for name, other in context.params.items():
        if name != "json" and isinstance(other, Path) and other.resolve() == path.resolve():
            raise InputError(f"the summary {path} is another file of this command; rename it")
    check_new(path, "summary", common.overwrite)


def as_json(record: Any) -> str:
    """As JSON, which has no NaN: what is missing is null; what it does not know is text."""
    text = json.dumps(record, default=_as_number)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1, ensure_ascii=False)


def _as_number(value: Any) -> Any:
    """numpy's numbers as Python's own, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _say(message: str, to: Console, style: str = "") -> None:
    # A line is to stay a line.
    to.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _with_options(told: Warning | InputError | str, context: typer.Context) -> str:
    """A message, and the options of this command for the arguments that it advises to change."""
    advised = told.mend if isinstance(told, InputError | Advice) else {}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [
        options[name] if value is None or value is True else f"{options[name]} {_quoted(value)}"
        for name, value in advised.items()
        if name in options
    ]
    return f"{told} (on the command line: {', '.join(given)})" if given else str(told)


def _given_by(error: InputError, context: typer.Context) -> str:
    """The options whose values an error quotes, such as a column that is not there."""
    named = [
        parameter.opts[0]
        for parameter in context.command.params
        if not _is_default(context, parameter.name)
        and any(f"{value!r}" in str(error) for value in _texts(context.params[parameter.name]))
    ]
    return f" (given by {', '.join(named)})" if named else ""


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)  # of an enum that click has, and typer its own
    return source is None or source.name == "DEFAULT"


def _texts(value: Any) -> list[str]:
    """The texts in the value of an option."""
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in values if isinstance(text, str)]

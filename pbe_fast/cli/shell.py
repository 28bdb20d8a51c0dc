"""What every command shares: exit codes, errors in one line, help in sections with an example, notes and results."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pbe_fast.cli import INTERRUPTED
from pbe_fast.engine import interrupts
from pbe_fast.errors import OutputError, PBEError, PBEWarning, VerificationError

EXIT_CHECK, EXIT_INPUT, EXIT_BUG = 1, 2, 3

EXIT_CODES = """\b
Exit codes:
  0    fine
  1    a check failed: the ONNX file does not compute what the model computes, with --fail-on-backdoor a
       backdoor was found, or a cell of reproduce could not be made
  2    wrong usage or bad input: one line on stderr says what was got and what is accepted
  3    an error inside pbe-fast, with its traceback
  130  interrupted with Ctrl-C; every file under its final name is whole
  143  ended by SIGTERM, likewise
"""

_OUT_FOLDER = "pbe_fast.out"


class Option(click.Option):
    """An option that ``--help`` lists under a heading of its own."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help has its options in sections, and an example at the end."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section, in the order in which sections first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "section", "Running"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example as it stands."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """Turns whatever a command raises into a line on stderr and an exit code."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            result = self._invoke(ctx)
            interrupts.check()
            return result
        except BaseException as error:
            # Caught on its way, a signal leaves errors of another kind, or none.
            if isinstance(error, KeyboardInterrupt) or interrupts.pressed():
                self._end(ctx, interrupts.exit_code(), INTERRUPTED)
            raise

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except VerificationError as error:
            self._end(ctx, EXIT_CHECK, f"error: {_one_line(error)}", error)
        except (PBEError, OSError) as error:
            self._end(ctx, EXIT_INPUT, f"error: {_one_line(error)}", error)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            _remove_if_empty(ctx)
            raise
        except Exception as error:
            if interrupts.pressed():
                raise
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            self._end(ctx, EXIT_BUG, "error: this is a fault of pbe-fast; please report it with the lines above")

    def _end(self, ctx: click.Context, code: int, message: str, error: BaseException | None = None) -> None:
        if error is not None and ctx.meta.get("debug"):
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        _remove_if_empty(ctx)
        click.echo(message, err=True)
        ctx.exit(code)


def open_output(folder: Path, *, force: bool) -> None:
    """`prepare_output`; if the command then fails, a folder that was made for it goes again."""
    from pbe_fast.engine.files import prepare_output

    existed = folder.exists()
    prepare_output(folder, force=force)
    if not existed:
        click.get_current_context().meta[_OUT_FOLDER] = folder


def open_file(path: Path, *, force: bool) -> None:
    """Checks before any work that a file can be written, and that nothing is lost by it."""
    if path.is_dir() or (path.exists() and not force):
        what = "a folder" if path.is_dir() else "a file that exists"
        raise OutputError(f"output {path}: got {what}; accepted: a name that is free, or --force to replace a file")
    open_output(path.parent, force=True)


def _remove_if_empty(ctx: click.Context) -> None:
    folder = ctx.meta.get(_OUT_FOLDER)
    if folder is not None and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Console:
    """Results go to stdout, everything else to stderr.

    Args:
        as_json: Results are one JSON document.
        quiet: No notes and no progress bars.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.progress = not quiet

    def note(self, text: str) -> None:
        """Something that is good to know while the command runs."""
        interrupts.check()
        if self.progress:
            click.echo(text, err=True)

    @contextmanager
    def notes_for_warnings(self) -> Iterator[None]:
        """The package's own warnings become notes, each of them once; those of others stay what they are."""
        said: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, PBEWarning):
                others(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                self.note(f"note: {message}")

        with warnings.catch_warnings():
            others, warnings.showwarning = warnings.showwarning, show
            warnings.simplefilter("always", PBEWarning)
            yield

    def result(self, text: str, report: Mapping[str, Any]) -> None:
        """What the command was run for: ``report`` with --json, else ``text``."""
        interrupts.check()
        if not self.as_json:
            click.echo(text)
            return
        from pbe_fast.result import plain  # loads torch, which every command with a result has done by now

        # A share of no image is not a number, and JSON has no word for that.
        click.echo(json.dumps(plain(report), indent=2, allow_nan=False))

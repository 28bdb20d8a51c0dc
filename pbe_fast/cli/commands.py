"""The group of all commands. PyTorch is imported by the commands that need it, when they run."""

from __future__ import annotations

import click

import pbe_fast
from pbe_fast.cli.attack import attack
from pbe_fast.cli.demo import demo
from pbe_fast.cli.evaluate import evaluate
from pbe_fast.cli.export import export
from pbe_fast.cli.purify import purify
from pbe_fast.cli.rank import rank
from pbe_fast.cli.reproduce import reproduce
from pbe_fast.cli.scan import scan
from pbe_fast.cli.shell import EXIT_CODES, Group
from pbe_fast.cli.verify import verify

_HELP = f"""Purify image classifiers that may carry a backdoor, and find the poisoned training images.

\b
Try it:         pbe-fast demo
Your own model: pbe-fast purify --model model.pt --arch module:function \\
                    --train images/ --out purified/
From the start: pbe-fast attack --help, then scan, purify, evaluate, export, verify

Each command reads and writes files, so that they chain. Results go to stdout, notes to stderr.

{EXIT_CODES}"""


class _InOrder(Group):
    """Lists the commands in the order in which they chain."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(pbe_fast.__version__, prog_name="pbe-fast")
def main() -> None:
    """The group of all commands."""


for _command in (attack, scan, purify, rank, evaluate, export, verify, demo, reproduce):
    main.add_command(_command)

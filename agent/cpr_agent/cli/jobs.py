"""Jobs of the agent, followed to their end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from cpr_agent.bus.client import Client
from cpr_agent.cli.session import EXIT_FAILED, tables


async def follow_job(
    client: Client, as_json: bool, member: str, wanted: dict[str, Any] | None, *, quiet: bool = False
) -> int:
    """Run a job with its steps on the screen, or each on a line of stderr for who reads a pipe."""
    if as_json:
        result = await client.run_job(member, wanted)
    else:
        with tables.progress() if sys.stderr.isatty() else _lines() as progress:
            result = await client.run_job(member, wanted, progress)
    return 0 if quiet and result == "done" else _report_job(as_json, result)


@contextlib.contextmanager
def _lines() -> Iterator[Callable[[str, float], None]]:
    told = ""

    def tell(step: str, done: float) -> None:  # noqa: ARG001 - there is no bar
        nonlocal told
        if step and step != told:
            click.echo(f"{step} ...", err=True)
            told = step

    yield tell


def _report_job(as_json: bool, result: str) -> int:
    if as_json:
        click.echo(json.dumps({"result": result}))
    elif result == "done":
        click.echo("done")
    else:
        click.echo(f"cprctl: {result}", err=True)
    return 0 if result == "done" else EXIT_FAILED

"""Jobs of the agent, followed to their end: on a terminal each guest in a row of its own, in a pipe a line a change."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, Deaf, JobEnd, RunningJob, Watcher
from cpr_agent.cli.session import EXIT_INTERRUPTED, show, tell_error


async def follow_job(client: Client, as_json: bool, member: str, wanted: dict[str, Any] | None) -> int:
    """Run a job to its end and say how it went; returns the exit code."""
    end = await job_end(client, as_json, member, wanted)
    if end is None:
        return EXIT_INTERRUPTED
    if end.result != "done":
        return tell_job_error(as_json, end)
    vms = {name: state for name, state, _ in await client.manager("ListVMs")} if as_json else {}
    show(as_json, {"result": end.result, "vms": vms}, lambda data: click.echo(data["result"]))
    return 0


async def job_end(client: Client, as_json: bool, member: str, wanted: dict[str, Any] | None) -> JobEnd | None:
    """Run a job to its end; None if somebody at the terminal has left it to itself. Raises CallError."""
    job = await client.start_job(member, wanted)
    try:
        with _watcher(as_json) as watcher:
            return await job.end(watcher)
    except asyncio.CancelledError:  # what asyncio.run makes of the first Ctrl-C
        if not await _interrupted(job, as_json):
            return None
        with _watcher(as_json) as watcher:
            return await job.end(watcher)


def tell_job_error(as_json: bool, end: JobEnd, **more: Any) -> int:
    """What a job ended with that is not "done"; returns the exit code."""
    facts = {"kind": "Cancelled" if end.result == "cancelled" else "Failed", "text": end.result, **end.error}
    text = f"{end.result}: {facts['text']}" if end.result == "nothing to do" else facts["text"]
    vm, remedy = facts.get("vm", ""), facts.get("remedy", "")
    return tell_error(as_json, facts["kind"], text, vm=vm, remedy=remedy, **more)


async def _interrupted(job: RunningJob, as_json: bool) -> bool:
    """Ctrl-C ends the watching alone. On a terminal it is asked whether the job shall end too; True if it does."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        click.echo("\nThe agent goes on with this job without you. Take it back?", err=True)
        try:
            wanted = click.confirm("Cancel the job", default=False, err=True)
        except click.Abort:  # Ctrl-C again
            click.echo(err=True)
            wanted = False
        if wanted:
            try:
                await job.cancel()
                return True
            except CallError as error:
                click.echo(f"cprctl: {error}", err=True)
    text = f"interrupted; job {job.id} goes on. `cprctl status` shows it, `cprctl cancel {job.id}` takes it back"
    tell_error(as_json, "Interrupted", text)
    return False


@contextmanager
def _watcher(as_json: bool) -> Iterator[Watcher]:
    """rich is imported for the screen only: it takes longer than most jobs."""
    if as_json:
        yield Deaf()
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from cpr_agent.cli.screen import screen

        with screen() as watcher:
            yield watcher
    else:
        yield Lines()


class Lines:
    """Each step and each VM's change of state on a line of stderr."""

    def __init__(self) -> None:
        self._step = ""
        self._states: dict[str, str] = {}

    def step(self, what: str, done: float) -> None:  # noqa: ARG002 - there is no bar
        if what and what != self._step:
            click.echo(f"{what} ...", err=True)
            self._step = what

    def vm(self, name: str, state: str) -> None:
        if self._states.setdefault(name, state) != state:
            click.echo(f"{name}: {state}", err=True)
            self._states[name] = state

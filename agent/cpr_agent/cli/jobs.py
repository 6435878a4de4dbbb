# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs of the agent, followed to their end: on a terminal each guest in a row of its own, in a pipe a line a change."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, JobEnd, NullWatcher, RunningJob, Watcher
from cpr_agent.cli.session import EXIT_INTERRUPTED, Output, Work, complain
from cpr_agent.cli.terminal import of_vm, without_paths, wrapped
from cpr_agent.words import counted, length


def follow(member: str, wanted: dict[str, Any] | None) -> Work:
    """Run a job to its end and report how it went."""

    async def work(client: Client, output: Output) -> int:
        began = time.monotonic()
        end = await job_end(client, output, member, wanted)
        if end is None:
            return EXIT_INTERRUPTED
        if end.result != "done":
            return job_error(output, end)
        vms = {name: state for name, state, _ in await client.manager("ListVMs")} if output.as_json else {}
        took_s = time.monotonic() - began
        output.show({"result": end.result, "vms": vms}, lambda _: click.echo(_outcome(end, took_s)))
        return 0

    return work


_DONE = {
    "saved": "{} saved",
    "shut-down": "{} shut down",
    "resumed": "{} resumed",
    "loaded": "{} loaded",
    "started": "{} started",
    "refreshed": "{} in a new QEMU",
}
"""What has become of so many guests, by their last step."""


def _outcome(end: JobEnd, took_s: float) -> str:
    """In a sentence."""
    counts = Counter(guest["step"] for guest in end.guests.values())
    parts = [words.format(counted(counts[step], "guest")) for step, words in _DONE.items() if counts[step]]
    return f"{', '.join(parts)} in {length(took_s)}" if parts else f"{end.result} in {length(took_s)}"


async def job_end(client: Client, output: Output, member: str, wanted: dict[str, Any] | None) -> JobEnd | None:
    """Run a job to its end; None if it goes on without us, after a Ctrl-C. Raises CallError."""
    job = await client.start_job(member, wanted)
    try:
        with _watcher(output) as watcher:
            return await job.end(watcher)
    except asyncio.CancelledError:  # asyncio.run makes one of the first Ctrl-C
        if not await _cancelled(job, output):
            return None
        with _watcher(output) as watcher:
            return await job.end(watcher)


def job_error(output: Output, end: JobEnd, **more: Any) -> int:
    """Print why a job did not end with "done"; returns the exit code."""
    facts = {"kind": "Cancelled" if end.result == "cancelled" else "Failed", "text": end.result, **end.error}
    text = without_paths(f"{end.result}: {facts['text']}" if end.result == "nothing to do" else facts["text"])
    vm, remedy = facts.get("vm", ""), facts.get("remedy", "")
    failed = {name: guest["error"] for name, guest in sorted(end.guests.items()) if "error" in guest}
    if output.as_json or not failed or not facts.get("left"):
        return output.error(facts["kind"], text, vm=vm, remedy=remedy, **more)
    for name, error in failed.items():
        click.echo(wrapped(of_vm(name, _first_sentence(error, facts)), f"{name}: ", sys.stderr), err=True)
    return output.error(facts["kind"], _sentences(facts["left"], remedy), vm=vm, remedy=remedy, **more)


def _first_sentence(error: str, facts: dict[str, Any]) -> str:
    """Of one guest, without what is said of all of them at the end."""
    for part in (facts["left"], facts.get("remedy", "")):
        error = error.replace(f" {_sentences(part)}", "") if part else error
    return error


def _sentences(*parts: str) -> str:
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts if part)


async def _cancelled(job: RunningJob, output: Output) -> bool:
    """After a Ctrl-C: ask on a terminal whether to cancel the job too, and do so; False if the job goes on."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        click.echo(err=True)
        try:
            wanted = click.confirm(f"Cancel job {job.id}? It goes on otherwise", default=False, err=True)
        except click.Abort:  # Ctrl-C again
            click.echo(err=True)
            wanted = False
        if wanted:
            try:
                await job.cancel()
                return True
            except CallError as error:
                complain(without_paths(str(error)))
    text = f"interrupted; job {job.id} goes on. `cprctl status` shows it, `cprctl cancel {job.id}` takes it back"
    output.error("Interrupted", text)
    return False


@contextmanager
def _watcher(output: Output) -> Iterator[Watcher]:
    """rich is imported for the screen only: it takes longer than most jobs."""
    if output.as_json:
        yield NullWatcher()
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

# SPDX-License-Identifier: GPL-2.0-or-later
"""A command's way to the agent and back: connect, do its work, print the result or the error, exit with a code."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import click

from cpr_agent.bus.client import CallError, Client
from cpr_agent.cli.terminal import DOCUMENTS, nearest, without_paths, wrapped
from cpr_agent.errors import Blocked, KernelRefused, NotAdoptable, NothingToDo, ProofFailed, SaveRefused, UpgradeRefused

EXIT_FAILED = 1
EXIT_NOTHING = 2
EXIT_NOT_FOUND = 3
EXIT_REFUSED = 4
EXIT_NO_AGENT = 5
EXIT_USAGE = 64
"""EX_USAGE of sysexits.h."""
EXIT_DENIED = 77
"""EX_NOPERM of sysexits.h."""
EXIT_INTERRUPTED = 130
"""The status that a shell reports for a program that SIGINT ended."""

_AS_ROOT = f"Use sudo, or have an administrator give you the right: {DOCUMENTS}/access.md"
_UNKNOWN_OBJECT = "org.freedesktop.DBus.Error.UnknownObject"
_EXITS = {
    NothingToDo.kind: EXIT_NOTHING,
    "NoSuchVM": EXIT_NOT_FOUND,
    "NoSuchReport": EXIT_NOT_FOUND,
    "NoSuchJob": EXIT_NOT_FOUND,
    "NoCheckpoint": EXIT_NOT_FOUND,
    **{
        error.kind: EXIT_REFUSED
        for error in (Blocked, KernelRefused, NotAdoptable, SaveRefused, UpgradeRefused, ProofFailed)
    },
    **{error.kind: EXIT_REFUSED for error in ProofFailed.__subclasses__()},
    "AccessDenied": EXIT_DENIED,
    "org.freedesktop.DBus.Error.AccessDenied": EXIT_DENIED,
    "NoBus": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.ServiceUnknown": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.NameHasNoOwner": EXIT_NO_AGENT,
    "Usage": EXIT_USAGE,
    "Interrupted": EXIT_INTERRUPTED,
}


@dataclass(frozen=True)
class Target:
    """The agent to talk to: on the bus at ``address`` (None: the system bus), or that of ``host``. ``as_json``: --json
    stood before the command."""

    address: str | None = None
    host: str = ""
    as_json: bool = False


@dataclass(frozen=True)
class Output:
    """Results go to stdout, as tables or as one JSON document. Errors go to stderr, and with ``as_json`` to stdout as well,
    where a program looks."""

    as_json: bool = False

    def show(self, data: Any, table: Callable[[Any], object]) -> None:
        if self.as_json:
            click.echo(json.dumps(data, indent=2, sort_keys=True))
        else:
            table(data)

    def error(self, kind: str, message: str, *, vm: str = "", remedy: str = "", **more: Any) -> int:
        """``more`` joins the error in the JSON document. Returns the exit code."""
        if self.as_json:
            self.show({**more, **error_document(kind, message, vm, remedy)}, complain)
        complain(message)
        return exit_code(kind)


def error_document(kind: str, message: str, vm: str, remedy: str = "") -> dict[str, Any]:
    return {"error": {"kind": kind.rpartition(".")[2], "message": message, "vm": vm, "remedy": remedy}}


def exit_code(kind: str) -> int:
    """Of an error."""
    return _EXITS.get(kind, EXIT_FAILED)


Work = Callable[[Client, Output], Awaitable[int]]
"""Returns the exit code. Raises CallError."""


def complain(text: str) -> None:
    click.echo(wrapped(text, "cprctl: ", sys.stderr), err=True)


def command(name: str | None = None) -> Callable[[Callable[..., Work]], click.Command]:
    """Make a command, with --json. Its callback checks its arguments, and returns the work that needs the agent."""

    def decorate(callback: Callable[..., Work]) -> click.Command:
        @wraps(callback)
        def call(*, as_json: bool, **arguments: Any) -> NoReturn:
            names: Sequence[str] = arguments.get("names") or ()
            vm = arguments.get("vm") or (names[0] if len(names) == 1 else "")
            _run(callback(**arguments), Output(as_json or target().as_json), vm)

        made = click.command(name)(call)
        wants_json = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.")
        made.params.append(wants_json)
        return made

    return decorate


def target() -> Target:
    """The agent that this invocation of cprctl talks to."""
    chosen: Target = click.get_current_context().obj
    return chosen


def require_this_host(what: str) -> None:
    """Raises UsageError if the agent is another host's."""
    if target().host:
        raise click.UsageError(f"{what} works on this host only, not with -H")


def _run(work: Work, output: Output, vm: str) -> NoReturn:
    agent = target()

    async def connected() -> int:
        async with Client.connected(agent.address, agent.host) as client:
            try:
                return await work(client, output)
            except CallError as error:
                raise await in_words(client, error, vm) from None

    try:
        sys.exit(asyncio.run(connected()))
    except CallError as error:
        sys.exit(_call_error(output, error, agent.host, vm))
    except KeyboardInterrupt:
        sys.exit(output.error("Interrupted", "interrupted; the agent finishes what it has begun"))


async def in_words(client: Client, error: CallError, vm: str) -> CallError:
    """An error about ``vm`` ("" for none) as people want it: of a name that is none, with those that are like it."""
    if error.kind not in (_UNKNOWN_OBJECT, "NoSuchVM") or not vm:
        return error
    try:
        known = [name for name, _, _ in await client.manager("ListVMs")]
    except CallError:
        known = []
    return CallError("NoSuchVM", f"no VM named {vm}{nearest(vm, known) or '. See: cprctl list'}")


async def each(
    client: Client,
    output: Output,
    names: Sequence[str],
    act: Callable[[str], Awaitable[Any]],
    table: Callable[[Any], object],
) -> int:
    """Act on one VM after the other, and show each result. The failure of one keeps no other from its turn. As JSON, one
    result, or a list of them. Returns the first failure's exit code."""
    shown, code = [], 0
    for name in names:
        try:
            data = await act(name)
        except CallError as failed:
            if len(names) == 1:
                raise
            error = await in_words(client, failed, name)
            text = without_paths(str(error))
            complain(text)
            code = code or exit_code(error.kind)
            shown.append(error_document(error.kind, text, name))
        else:
            if not output.as_json:
                table(data)
            shown.append(data)
    if output.as_json:
        output.show(shown[0] if len(names) == 1 else shown, table)
    return code


def _call_error(output: Output, error: CallError, host: str, vm: str) -> int:
    text, remedy = without_paths(str(error)), ""
    if exit_code(error.kind) == EXIT_NO_AGENT:
        where, lacks_bus = f" on {host}" if host else "", error.kind == "NoBus"
        remedy = f"See{where}: systemctl status {'dbus.service' if lacks_bus else 'cpr-agent.service'}"
        text = f"{text if lacks_bus else f'the agent is not there: {text}'}. {remedy}"
    elif exit_code(error.kind) == EXIT_DENIED:
        text = f"{text} {_AS_ROOT}" if "sudo" not in text else text
    return output.error(error.kind, text, vm=vm, remedy=remedy)


class _Tables:
    """cli.tables, imported when a table is drawn: rich takes longer than most calls, and guests wait for `load --all`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from cpr_agent.cli import tables as module

        table: Callable[..., Any] = getattr(module, name)
        return table


tables = _Tables()

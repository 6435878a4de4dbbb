"""What every command needs: a connection for its work, an exit code and an error text for what comes of it, output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from cpr_agent.bus.client import CallError, Client
from cpr_agent.errors import Blocked, KernelRefused, NothingToDo, ProofFailed, SaveRefused, UpgradeRefused

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
"""What a shell says of a program that SIGINT ended."""

_UNKNOWN_OBJECT = "org.freedesktop.DBus.Error.UnknownObject"
_EXITS = {
    NothingToDo.kind: EXIT_NOTHING,
    "NoSuchVM": EXIT_NOT_FOUND,
    "NoSuchReport": EXIT_NOT_FOUND,
    "NoCheckpoint": EXIT_NOT_FOUND,
    **{error.kind: EXIT_REFUSED for error in (Blocked, KernelRefused, SaveRefused, UpgradeRefused, ProofFailed)},
    **{error.kind: EXIT_REFUSED for error in ProofFailed.__subclasses__()},
    "AccessDenied": EXIT_DENIED,
    "org.freedesktop.DBus.Error.AccessDenied": EXIT_DENIED,
    "NoBus": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.ServiceUnknown": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.NameHasNoOwner": EXIT_NO_AGENT,
    "Usage": EXIT_USAGE,
    "Interrupted": EXIT_INTERRUPTED,
}

Work = Callable[[Client], Awaitable[int]]


@dataclass(frozen=True)
class Target:
    """Whose agent: the one on the bus at ``address`` (None: the system bus), or the one of ``host``."""

    address: str | None = None
    host: str = ""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/cprctl.md has its schema).")
pass_context = click.pass_context


def run(context: click.Context, work: Work) -> NoReturn:
    """Connect, do the work, exit with its status; errors go to stderr with what to do next, and with --json to stdout."""
    as_json = bool(context.params.get("as_json"))
    target: Target = context.obj

    async def connected() -> int:
        async with Client.connected(target.address, target.host) as client:
            try:
                return await work(client)
            except CallError as error:
                raise (await client.explained(error) if as_json else error) from None

    try:
        sys.exit(asyncio.run(connected()))
    except CallError as error:
        sys.exit(tell_call_error(as_json, error, target.host, context.params.get("vm") or ""))
    except KeyboardInterrupt:
        sys.exit(tell_error(as_json, "Interrupted", "interrupted; what the agent has begun it goes on with"))


def tell_call_error(as_json: bool, error: CallError, host: str, vm: str) -> int:
    kind, text = error.kind, str(error)
    if kind == _UNKNOWN_OBJECT:
        kind, text = "NoSuchVM", f"there is no such VM ({text}). See: cprctl list"
    elif _EXITS.get(kind) == EXIT_NO_AGENT:
        where = f" on {host}" if host else ""
        text = f"the agent is not there: {text}. See{where}: systemctl status cpr-agent.service"
    return tell_error(as_json, kind, text, vm=error.facts.get("vm") or vm, remedy=error.facts.get("remedy", ""))


def tell_error(as_json: bool, kind: str, message: str, *, vm: str = "", remedy: str = "", **more: Any) -> int:
    """In words on stderr, and with --json on stdout too, where a program looks for the result; returns the exit code."""
    if as_json:
        error = {"kind": kind.rpartition(".")[2], "message": message, "vm": vm, "remedy": remedy}
        show(True, {**more, "error": error}, lambda _: None)
    click.echo(f"cprctl: {message}", err=True)
    return _EXITS.get(kind, EXIT_FAILED)


def show(as_json: bool, data: Any, table: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=2, sort_keys=True))
    else:
        table(data)


class _Tables:
    """cli.tables, imported when a table is drawn: rich takes longer than most calls, and guests wait for `load --all`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from cpr_agent.cli import tables as module

        table: Callable[..., Any] = getattr(module, name)
        return table


tables = _Tables()

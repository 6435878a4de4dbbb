"""What every command needs: a connection for its work, an exit code and an error text for what comes of it, output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import click

from cpr_agent.bus.client import CallError, Client
from cpr_agent.errors import Blocked, KernelRefused, ProofFailed, UpgradeRefused

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_REFUSED = 4
EXIT_NO_AGENT = 5
EXIT_DENIED = 77

_EXITS = {
    "NoSuchVM": EXIT_NOT_FOUND,
    "NoSuchReport": EXIT_NOT_FOUND,
    "org.freedesktop.DBus.Error.UnknownObject": EXIT_NOT_FOUND,
    "NoCheckpoint": EXIT_NOT_FOUND,
    **{error.kind: EXIT_REFUSED for error in (Blocked, KernelRefused, UpgradeRefused, ProofFailed)},
    **{error.kind: EXIT_REFUSED for error in ProofFailed.__subclasses__()},
    "AccessDenied": EXIT_DENIED,
    "org.freedesktop.DBus.Error.AccessDenied": EXIT_DENIED,
    "NoBus": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.ServiceUnknown": EXIT_NO_AGENT,
    "org.freedesktop.DBus.Error.NameHasNoOwner": EXIT_NO_AGENT,
}

Work = Callable[[Client], Awaitable[int]]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
pass_context = click.pass_context


def run(context: click.Context, work: Work) -> NoReturn:
    """Connect, do the work, exit with its status; errors go to stderr with what to do next."""

    async def connected() -> int:
        async with Client.connected(context.obj) as client:
            return await work(client)

    try:
        sys.exit(asyncio.run(connected()))
    except CallError as error:
        text = str(error)
        if error.kind == "org.freedesktop.DBus.Error.UnknownObject":
            text = f"there is no such VM ({text}). See: cprctl list"
        elif _EXITS.get(error.kind) == EXIT_NO_AGENT:
            text = f"the agent is not there: {text}. See: systemctl status cpr-agent.service"
        click.echo(f"cprctl: {text}", err=True)
        sys.exit(_EXITS.get(error.kind, EXIT_FAILED))


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

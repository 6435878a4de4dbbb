# SPDX-License-Identifier: GPL-2.0-or-later
"""Completions that only the agent knows. They must come quickly, and an error must print nothing."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Collection
from typing import Any

import click

from cpr_agent.bus.client import CallError, Client
from cpr_agent.core.states import VmState

TIMEOUT_S = 1.0
REPORTS = 20
MANAGER = "org.cpragent1.Manager"
SAVED = (VmState.SAVED, VmState.HELD)
Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _ask(context: click.Context, interface: str, member: str, signature: str = "", *body: Any) -> Any:
    """What an agent of this host says; None without one. That of another host would take too long for a Tab."""
    target = context.find_root().params
    if target.get("host"):
        return None

    async def asked() -> Any:
        async with Client.connected(target.get("bus_address"), timeout_s=TIMEOUT_S) as client:
            return await client.quietly(interface, member, signature, *body, timeout_s=TIMEOUT_S)

    try:
        return asyncio.run(asked())
    except (CallError, TimeoutError):
        return None


def vm_names(states: Collection[str] = ()) -> Complete:
    """Names of VMs: of those alone that are in one of ``states``, where there are any. None comes twice."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
        given = context.params.get("names") or ()
        known = _ask(context, MANAGER, "ListVMs") or []
        wanted = [name for name, state, _ in known if not states or state in states]
        return [name for name in wanted if name.startswith(incomplete) and name not in given]

    return complete


def job_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    """Of jobs that are under way."""
    jobs = _ask(context, "org.freedesktop.DBus.Properties", "Get", "ss", MANAGER, "Jobs") or []
    return [number for path in jobs if (number := path.rpartition("/")[2]).startswith(incomplete)]


def report_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    """The beginnings of the newest reports' ids, as `history` shows them."""
    found = _ask(context, MANAGER, "ListReports", "ud", REPORTS, 0.0) or []
    return [one for entry in found if (one := entry["id"][:8]).startswith(incomplete)]


def domain_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    """Names of libvirt's domains on this host, if virsh(1) knows any."""
    if context.find_root().params.get("host"):
        return []
    command = ("virsh", "--quiet", "--readonly", "--connect", "qemu:///system", "list", "--all", "--name")
    try:
        listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [name for name in listed.stdout.decode(errors="replace").split("\n") if name and name.startswith(incomplete)]


def vms_argument(states: Collection[str] = (), *, required: bool = True) -> Callable[[Any], Any]:
    """One VM or several."""
    return click.argument("names", metavar="VM...", nargs=-1, required=required, shell_complete=vm_names(states))


domain_argument = click.argument("vm", metavar="DOMAIN", shell_complete=domain_names)
vm_argument = click.argument("vm", metavar="VM", shell_complete=vm_names())
some_vm_argument = click.argument("vm", metavar="[VM]", required=False, shell_complete=vm_names())
job_argument = click.argument("job", metavar="JOB", type=click.IntRange(min=1), shell_complete=job_ids)
report_argument = click.argument("wanted", metavar="[ID]", default="", shell_complete=report_ids)

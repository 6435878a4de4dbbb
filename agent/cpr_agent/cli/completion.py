# SPDX-License-Identifier: GPL-2.0-or-later
"""Completions that only the agent knows. They must come quickly, and an error must print nothing."""

from __future__ import annotations

import asyncio
import subprocess

import click

from cpr_agent.bus.client import CallError, Client

TIMEOUT_S = 1.0


def vm_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    """Names of VMs, if an agent runs on this host. Those of another host would take too long for a Tab."""
    target = context.find_root().params
    if target.get("host"):
        return []

    async def names() -> list[str]:
        async with Client.connected(target.get("bus_address"), timeout_s=TIMEOUT_S) as client:
            return await client.vm_names(TIMEOUT_S)

    try:
        return [name for name in asyncio.run(names()) if name.startswith(incomplete)]
    except (CallError, TimeoutError):
        return []


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


domain_argument = click.argument("vm", metavar="DOMAIN", shell_complete=domain_names)
vm_argument = click.argument("vm", shell_complete=vm_names)
some_vm_argument = click.argument("vm", required=False, shell_complete=vm_names)

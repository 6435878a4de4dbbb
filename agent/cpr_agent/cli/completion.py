# SPDX-License-Identifier: GPL-2.0-or-later
"""Completions that only the agent knows. They must come quickly, and an error must print nothing."""

from __future__ import annotations

import asyncio

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


vm_argument = click.argument("vm", shell_complete=vm_names)
some_vm_argument = click.argument("vm", required=False, shell_complete=vm_names)

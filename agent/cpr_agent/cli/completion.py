"""What a shell offers after Tab that only the agent knows. Must be quick, and silent about whatever is wrong."""

from __future__ import annotations

import asyncio

import click

from cpr_agent.bus.client import CallError, Client

TIMEOUT_S = 1.0


def vm_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    """Names of VMs, of an agent that runs on this host. Another host's would take longer than a Tab may."""
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

"""Commands about the memory that guests can be in."""

from __future__ import annotations

import click

from cpr_agent.bus.client import Client, options, plain
from cpr_agent.cli.completion import vm_argument
from cpr_agent.cli.session import json_option, pass_context, run, show, tables


@click.command()
@json_option
@pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List the persistent-memory devices, and who uses them."""

    async def work(client: Client) -> int:
        show(as_json, plain(await client.manager("ListDevices")), tables.devices)
        return 0

    run(context, work)


@click.group()
def memory() -> None:
    """Find room for a guest's RAM."""


@memory.command("allocate")
@vm_argument
@click.option("--size", default="", help="As 4G (default: that of the VM's definition).")
@click.option("--device", default="", help="On this device: its uuid, or its node (default: the best fit on any).")
@json_option
@pass_context
def memory_allocate(context: click.Context, vm: str, size: str, device: str, as_json: bool) -> None:
    """Print the [memory] section for a VM: a free, aligned range of a dax device. Reserves nothing."""

    async def work(client: Client) -> int:
        wanted = options(size=size or None, device=device or None)
        show(as_json, plain(await client.manager("AllocateMemory", "sa{sv}", vm, wanted)), tables.memory)
        return 0

    run(context, work)


COMMANDS = (devices, memory)

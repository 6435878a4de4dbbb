# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about the memory that guests can be in."""

from __future__ import annotations

import click

from cpr_agent.bus.client import Client, options, plain
from cpr_agent.cli.completion import vm_argument
from cpr_agent.cli.session import Output, Work, command, tables


@command()
def devices() -> Work:
    """List the persistent-memory devices, and the VMs that use them."""

    async def work(client: Client, output: Output) -> int:
        output.show(plain(await client.manager("ListDevices")), tables.devices)
        return 0

    return work


@click.group()
def memory() -> None:
    """Find room for a guest's RAM."""


@command("allocate")
@vm_argument
@click.option("--size", default="", help="As 4G (default: the size in the VM's definition).")
@click.option("--device", default="", help="On this device: its uuid, or its node (default: the best fit on any).")
def memory_allocate(vm: str, size: str, device: str) -> Work:
    """Find a free range for a VM's RAM.

    Prints the [memory] section: an aligned range of a dax device. Reserves nothing.
    """

    async def work(client: Client, output: Output) -> int:
        wanted = options(size=size, device=device)
        output.show(plain(await client.manager("AllocateMemory", "sa{sv}", vm, wanted)), tables.memory)
        return 0

    return work


memory.add_command(memory_allocate)

COMMANDS = (devices, memory)

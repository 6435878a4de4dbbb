# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about VMs: list and show them, and act on one or all of them."""

from __future__ import annotations

from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, options, plain
from cpr_agent.cli.completion import some_vm_argument, vm_argument
from cpr_agent.cli.jobs import follow
from cpr_agent.cli.session import EXIT_REFUSED, Output, Work, command, tables
from cpr_agent.core.states import Survives


async def _all_vms(client: Client) -> list[dict[str, Any]]:
    return [await client.properties(path, "VM") for _, _, path in await client.manager("ListVMs")]


async def _job(client: Client, path: str) -> dict[str, Any] | None:
    """None if it is over by now."""
    try:
        return await client.properties(path, "Job")
    except CallError:
        return None


@command("list")
def list_vms() -> Work:
    """List all VMs and their states."""

    async def work(client: Client, output: Output) -> int:
        output.show(await _all_vms(client), tables.vms)
        return 0

    return work


@command()
@some_vm_argument
def status(vm: str | None) -> Work:
    """Show one VM with its memory, checkpoint and problems, or the agent and all VMs."""

    async def work(client: Client, output: Output) -> int:
        if vm:
            output.show(await client.vm_properties(vm), tables.vm)
        else:
            about = await client.properties("/org/cpragent1", "Manager")
            jobs = [job for path in about["Jobs"] if (job := await _job(client, path))]
            output.show({**about, "Jobs": jobs, "VMs": await _all_vms(client)}, tables.agent)
        return 0

    return work


@command()
@vm_argument
def start(vm: str) -> Work:
    """Start a VM afresh. Refused while it has a live checkpoint."""
    return _act(vm, "started", "Start")


@command()
@vm_argument
@click.option("--hard", is_flag=True, help="Quit QEMU at once instead of pressing the power button.")
def stop(*, vm: str, hard: bool) -> Work:
    """Shut a VM down in order; after its shutdown-timeout, quit its QEMU."""
    return _act(vm, "stopped", "Stop", "s", "hard" if hard else "acpi")


@command()
@vm_argument
def resume(vm: str) -> Work:
    """Take a save back, or let a paused guest go on."""
    return _act(vm, "resumed", "Resume")


@command()
@vm_argument
@click.option("--yes", is_flag=True, help="Don't ask.")
def discard(*, vm: str, yes: bool) -> Work:
    """Give a VM's checkpoint up: the saved guest is lost."""
    if not yes:
        click.confirm(f"The saved guest of {vm} will be lost. Go on?", abort=True, err=True)
    return _act(vm, "checkpoint discarded", "Discard")


def _act(vm: str, done: str, member: str, signature: str = "", *body: Any) -> Work:
    """Call ``member`` of the VM, and then print ``done``, or all about the VM as JSON."""

    async def work(client: Client, output: Output) -> int:
        await client.vm(vm, member, signature, *body)
        output.show(await client.vm_properties(vm), lambda _: click.echo(f"{vm}: {done}"))
        return 0

    return work


@command()
@some_vm_argument
def check(vm: str | None) -> Work:
    """Find what would stop a save, or a load after a kexec. Stops nothing. Exits 4 if a finding is an error."""

    async def work(client: Client, output: Output) -> int:
        found = plain(await (client.vm(vm, "Check") if vm else client.manager("Check", "a{sv}", {})))
        output.show(found, tables.findings)
        return EXIT_REFUSED if any(finding["severity"] == "error" for finding in found) else 0

    return work


@command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Save every VM that has a live guest: all, or none.")
@click.option("--file", "filename", default="", help="State file (default: the agent's own place).")
@click.option(
    "--survives", type=click.Choice([need.value for need in Survives]), help="Refuse RAM that would not outlive this."
)
@click.option(
    "--before-kexec",
    is_flag=True,
    help="With --all: save for a kexec in progress; roll back if the kexec is cancelled.",
)
def save(*, vm: str | None, every: bool, filename: str, survives: str | None, before_kexec: bool) -> Work:
    """Save a VM's device state and leave its RAM where it is. The guest is stopped after."""
    _require_one_or_all(vm, every=every)
    wanted = options(survives=survives)
    if vm is None:
        return follow("SaveAll", {**wanted, **options(before_kexec=before_kexec or None)})

    async def work(client: Client, output: Output) -> int:
        await client.vm(vm, "CprSave", "ssa{sv}", filename, "reboot", wanted)
        output.show(await client.vm_properties(vm), lambda data: tables.saved(vm, data))
        return 0

    return work


@command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Load every VM that has a live checkpoint.")
@click.option("--autostart", is_flag=True, help="With --all: then start the VMs that have autostart and no checkpoint.")
@click.option("--file", "filename", default="", help="State file (default: where the save put it).")
def load(*, vm: str | None, every: bool, autostart: bool, filename: str) -> Work:
    """Prove a saved VM's memory and state, and let its guest go on in a new QEMU."""
    _require_one_or_all(vm, every=every)
    if vm is None:
        return follow("LoadAll", options(autostart=autostart))
    return _act(vm, "loaded", "CprLoad", "sa{sv}", filename, {})


@command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Every VM that has a live guest, one after the other.")
@click.option(
    "--in-turn", is_flag=True, help="End the old QEMU before the new one starts: both can't have the same tap device."
)
def refresh(*, vm: str | None, every: bool, in_turn: bool) -> Work:
    """Give a guest a new QEMU, of the program that is installed now, without a reboot of the host."""
    _require_one_or_all(vm, every=every)
    wanted = options(in_turn=in_turn or None)
    return follow("RefreshAll", wanted) if vm is None else _act(vm, "has a new QEMU", "Refresh", "a{sv}", wanted)


def _require_one_or_all(vm: str | None, *, every: bool) -> None:
    """Raises UsageError."""
    if (vm is not None) == every:
        raise click.UsageError("name one VM, or give --all")


COMMANDS = (list_vms, status, start, stop, resume, discard, check, save, load, refresh)

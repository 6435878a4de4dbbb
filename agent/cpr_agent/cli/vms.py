# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about VMs: list and show them, and act on one, some or all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, options, plain
from cpr_agent.cli.completion import SAVED, some_vm_argument, vms_argument
from cpr_agent.cli.jobs import follow
from cpr_agent.cli.session import EXIT_REFUSED, Output, Work, command, each, tables
from cpr_agent.core.states import Survives, VmState


async def all_vms(client: Client) -> list[dict[str, Any]]:
    return [await client.properties(path, "VM") for _, _, path in await client.manager("ListVMs")]


async def _job(client: Client, path: str) -> dict[str, Any] | None:
    """None if it is over by now."""
    try:
        return await client.properties(path, "Job")
    except CallError:
        return None


@command("list")
def list_vms() -> Work:
    """List all VMs, their states, and what is wrong with them."""

    async def work(client: Client, output: Output) -> int:
        output.show(await all_vms(client), tables.vms)
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
            output.show({**about, "Jobs": jobs, "VMs": await all_vms(client)}, tables.agent)
        return 0

    return work


@command()
@vms_argument()
def start(names: Sequence[str]) -> Work:
    """Start VMs afresh. Refused while one has a live checkpoint."""
    return _act(names, _said("started"), "Start")


@command()
@vms_argument()
@click.option("--hard", is_flag=True, help="Quit QEMU at once instead of pressing the power button.")
def stop(*, names: Sequence[str], hard: bool) -> Work:
    """Shut VMs down in order; after its shutdown-timeout, quit a VM's QEMU."""

    def said(vm: dict[str, Any]) -> None:
        name = vm["Name"]
        if vm["Checkpoint"]:
            stays = f"its guest stays saved: cprctl load {name} lets it go on, cprctl discard {name} gives it up"
            click.echo(f"{name}: its QEMU has ended; {stays}")
        else:
            click.echo(f"{name}: stopped")

    return _act(names, said, "Stop", "s", "hard" if hard else "acpi")


@command()
@vms_argument((*SAVED, VmState.PAUSED))
def resume(names: Sequence[str]) -> Work:
    """Take a save back, or let a paused guest go on."""
    return _act(names, _said("resumed"), "Resume")


@command()
@vms_argument(SAVED)
@click.option("--yes", is_flag=True, help="Don't ask.")
def discard(*, names: Sequence[str], yes: bool) -> Work:
    """Give a VM's checkpoint up: the saved guest is lost."""

    async def work(client: Client, output: Output) -> int:
        async def act(name: str) -> dict[str, Any]:
            if not (await client.vm_properties(name))["Checkpoint"]:
                raise CallError("NoCheckpoint", f"VM {name}: has no checkpoint that could be discarded. Nothing was done.")
            if not yes:
                click.confirm(f"The saved guest of {name} will be lost. Go on?", abort=True, err=True)
            await client.vm(name, "Discard")
            return await client.vm_properties(name)

        return await each(client, output, names, act, _said("checkpoint discarded"))

    return work


def _said(words: str) -> Callable[[dict[str, Any]], None]:
    return lambda vm: click.echo(f"{vm['Name']}: {words}")


def _act(
    names: Sequence[str], said: Callable[[dict[str, Any]], object], member: str, signature: str = "", *body: Any
) -> Work:
    """Call ``member`` of each VM, and then print what is ``said`` of it, or all about it as JSON."""

    async def work(client: Client, output: Output) -> int:
        async def act(name: str) -> dict[str, Any]:
            await client.vm(name, member, signature, *body)
            return await client.vm_properties(name)

        return await each(client, output, names, act, said)

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
@vms_argument(required=False)
@click.option("--all", "every", is_flag=True, help="Save every VM that has a live guest: all, or none.")
@click.option("--file", "filename", default="", help="State file (default: the agent's own place).")
@click.option(
    "--survives",
    type=click.Choice([need.value for need in Survives]),
    default=Survives.KEXEC.value,
    show_default=True,
    help="What the RAM must outlive: another is refused.",
)
@click.option(
    "--before-kexec",
    is_flag=True,
    help="With --all: save for a kexec in progress; roll back if the kexec is cancelled.",
)
def save(*, names: Sequence[str], every: bool, filename: str, survives: str, before_kexec: bool) -> Work:
    """Save VMs' device states and leave their RAM where it is. The guests are stopped after."""
    _require_some_or_all(names, every=every, filename=filename)
    if before_kexec and not every:
        raise click.UsageError("--before-kexec is for --all")
    if every:
        return follow("SaveAll", options(survives=survives, before_kexec=before_kexec or None))

    async def work(client: Client, output: Output) -> int:
        async def act(name: str) -> dict[str, Any]:
            try:
                await client.vm(name, "CprSave", "ssa{sv}", filename, "reboot", options(survives=survives))
            except CallError as error:
                if "does not survive a kexec" not in str(error):
                    raise
                raise CallError(error.kind, f"{error} For a restart of QEMU alone: --survives qemu-restart.") from None
            return await client.vm_properties(name)

        return await each(client, output, names, act, tables.saved)

    return work


@command()
@vms_argument(SAVED, required=False)
@click.option("--all", "every", is_flag=True, help="Load every VM that has a live checkpoint.")
@click.option("--autostart", is_flag=True, help="With --all: then start the VMs that have autostart and no checkpoint.")
@click.option("--file", "filename", default="", help="State file (default: where the save put it).")
def load(*, names: Sequence[str], every: bool, autostart: bool, filename: str) -> Work:
    """Prove saved VMs' memory and states, and let their guests go on in new QEMUs."""
    _require_some_or_all(names, every=every, filename=filename)
    if autostart and not every:
        raise click.UsageError("--autostart is for --all")
    if every:
        return follow("LoadAll", options(autostart=autostart))
    return _act(names, _said("loaded"), "CprLoad", "sa{sv}", filename, {})


@command()
@vms_argument((VmState.RUNNING, VmState.PAUSED, VmState.SUSPENDED), required=False)
@click.option("--all", "every", is_flag=True, help="Every VM that has a live guest, one after the other.")
@click.option(
    "--in-turn", is_flag=True, help="End the old QEMU before the new one starts: both can't have the same tap device."
)
def refresh(*, names: Sequence[str], every: bool, in_turn: bool) -> Work:
    """Give guests a new QEMU, of the program that is installed now, without a reboot of the host."""
    _require_some_or_all(names, every=every)
    wanted = options(in_turn=in_turn or None)
    return follow("RefreshAll", wanted) if every else _act(names, _said("has a new QEMU"), "Refresh", "a{sv}", wanted)


def _require_some_or_all(names: Sequence[str], *, every: bool, filename: str = "") -> None:
    """Raises UsageError."""
    if bool(names) == every:
        raise click.UsageError("name VMs, or give --all")
    if filename and len(names) != 1:
        raise click.UsageError("--file is for one VM")


COMMANDS = (list_vms, status, start, stop, resume, discard, check, save, load, refresh)

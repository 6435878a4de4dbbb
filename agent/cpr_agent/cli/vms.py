"""Commands about VMs: what there is, and acts on one or all of them."""

from __future__ import annotations

from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, options, plain
from cpr_agent.cli.completion import some_vm_argument, vm_argument
from cpr_agent.cli.jobs import follow_job
from cpr_agent.cli.session import EXIT_REFUSED, json_option, pass_context, run, show, tables
from cpr_agent.core.states import Survives

survives_option = click.option(
    "--survives", type=click.Choice([need.value for need in Survives]), help="Refuse RAM that would not outlive this."
)


async def _all_vms(client: Client) -> list[dict[str, Any]]:
    return [await client.properties(path, "VM") for _, _, path in await client.manager("ListVMs")]


async def _job(client: Client, path: str) -> dict[str, Any] | None:
    """None if it is over by now."""
    try:
        return await client.properties(path, "Job")
    except CallError:
        return None


@click.command("list")
@json_option
@pass_context
def list_vms(context: click.Context, as_json: bool) -> None:
    """List all VMs and their states."""

    async def work(client: Client) -> int:
        show(as_json, await _all_vms(client), tables.vms)
        return 0

    run(context, work)


@click.command()
@some_vm_argument
@json_option
@pass_context
def status(context: click.Context, vm: str | None, as_json: bool) -> None:
    """Show one VM with its memory, checkpoint and problems, or the agent and all VMs."""

    async def work(client: Client) -> int:
        if vm:
            show(as_json, await client.vm_properties(vm), tables.vm)
        else:
            about = await client.properties("/org/cpragent1", "Manager")
            jobs = [job for path in about["Jobs"] if (job := await _job(client, path))]
            show(as_json, {**about, "Jobs": jobs, "VMs": await _all_vms(client)}, tables.agent)
        return 0

    run(context, work)


@click.command()
@vm_argument
@json_option
@pass_context
def start(context: click.Context, vm: str, as_json: bool) -> None:
    """Start a VM afresh. Refused while it has a live checkpoint."""
    _act(context, vm, as_json, "started", "Start")


@click.command()
@vm_argument
@click.option("--hard", is_flag=True, help="Quit QEMU at once instead of pressing the power button.")
@json_option
@pass_context
def stop(context: click.Context, vm: str, hard: bool, as_json: bool) -> None:
    """Shut a VM down in order, and after its shutdown-timeout the hard way."""
    _act(context, vm, as_json, "stopped", "Stop", "s", "hard" if hard else "acpi")


@click.command()
@vm_argument
@json_option
@pass_context
def resume(context: click.Context, vm: str, as_json: bool) -> None:
    """Take a save back, or let a paused guest go on."""
    _act(context, vm, as_json, "resumed", "Resume")


@click.command()
@vm_argument
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
@pass_context
def discard(context: click.Context, vm: str, yes: bool, as_json: bool) -> None:
    """Give a VM's checkpoint up: the saved guest is lost."""
    if not yes:
        click.confirm(f"The saved guest of {vm} will be lost. Go on?", abort=True, err=True)
    _act(context, vm, as_json, "checkpoint discarded", "Discard")


def _act(context: click.Context, vm: str, as_json: bool, done: str, member: str, signature: str = "", *body: Any) -> None:
    async def work(client: Client) -> int:
        await client.vm(vm, member, signature, *body)
        show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: {done}"))
        return 0

    run(context, work)


@click.command()
@some_vm_argument
@json_option
@pass_context
def check(context: click.Context, vm: str | None, as_json: bool) -> None:
    """Say what would stop a save, or a load after a kexec. Stops nothing. Exits 4 if there is an error among it."""

    async def work(client: Client) -> int:
        found = plain(await (client.vm(vm, "Check") if vm else client.manager("Check", "a{sv}", {})))
        show(as_json, found, tables.findings)
        return EXIT_REFUSED if any(finding["severity"] == "error" for finding in found) else 0

    run(context, work)


@click.command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Save every VM that has a live guest: all, or none.")
@click.option("--file", "filename", default="", help="State file (default: the agent's own place).")
@click.option(
    "--survives", type=click.Choice([need.value for need in Survives]), help="Refuse RAM that would not outlive this."
)
@click.option("--before-kexec", is_flag=True, help="With --all: for a kexec under way, and taken back if it does not come.")
@json_option
@pass_context
def save(
    context: click.Context,
    vm: str | None,
    every: bool,
    filename: str,
    survives: str | None,
    before_kexec: bool,
    as_json: bool,
) -> None:
    """Save a VM's device state and leave its RAM where it is. The guest is stopped after."""
    _one_or_all(vm, every)
    wanted = options(survives=survives)

    async def work(client: Client) -> int:
        if vm:
            await client.vm(vm, "CprSave", "ssa{sv}", filename, "reboot", wanted)
            show(as_json, await client.vm_properties(vm), lambda data: tables.saved(vm, data))
            return 0
        return await follow_job(client, as_json, "SaveAll", {**wanted, **options(before_kexec=before_kexec or None)})

    run(context, work)


@click.command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Load every VM that has a live checkpoint.")
@click.option("--autostart", is_flag=True, help="With --all: then start the VMs that have autostart and no checkpoint.")
@click.option("--file", "filename", default="", help="State file (default: where the save put it).")
@json_option
@pass_context
def load(context: click.Context, vm: str | None, every: bool, autostart: bool, filename: str, as_json: bool) -> None:
    """Prove a saved VM's memory and state, and let its guest go on in a new QEMU."""
    _one_or_all(vm, every)

    async def work(client: Client) -> int:
        if vm:
            await client.vm(vm, "CprLoad", "sa{sv}", filename, {})
            show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: loaded"))
            return 0
        return await follow_job(client, as_json, "LoadAll", options(autostart=autostart))

    run(context, work)


@click.command()
@some_vm_argument
@click.option("--all", "every", is_flag=True, help="Every VM that has a live guest, one after the other.")
@click.option(
    "--in-turn", is_flag=True, help="End the old QEMU before the new one starts: both can't have the same tap device."
)
@json_option
@pass_context
def refresh(context: click.Context, vm: str | None, every: bool, in_turn: bool, as_json: bool) -> None:
    """Give a guest a new QEMU, of the program that is installed now, without a reboot of the host."""
    _one_or_all(vm, every)

    async def work(client: Client) -> int:
        wanted = options(in_turn=in_turn or None)
        if vm:
            await client.vm(vm, "Refresh", "a{sv}", wanted)
            show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: has a new QEMU"))
            return 0
        return await follow_job(client, as_json, "RefreshAll", wanted)

    run(context, work)


def _one_or_all(vm: str | None, every: bool) -> None:
    if bool(vm) == every:
        raise click.UsageError("name one VM, or give --all")


COMMANDS = (list_vms, status, start, stop, resume, discard, check, save, load, refresh)

"""cprctl: what an admin types."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import click

from cpr_agent import __version__
from cpr_agent.bus.client import CallError, Client, options, plain
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

EPILOG = """Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such VM, checkpoint or report, 4 refused by a check or a
proof, 5 no agent to talk to, 77 not allowed."""

Work = Callable[[Client], Awaitable[int]]


@click.group(epilog=EPILOG)
@click.option("--bus-address", envvar="CPR_AGENT_BUS_ADDRESS", help="D-Bus address (default: the system bus).")
@click.version_option(__version__, prog_name="cprctl")
@click.pass_context
def cli(context: click.Context, bus_address: str | None) -> None:
    """Administer cpr-agent: VMs whose RAM outlives their QEMU and their host's kernel."""
    context.obj = bus_address


def _run(context: click.Context, work: Work) -> NoReturn:
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


def _show(as_json: bool, data: Any, table: Callable[[Any], None]) -> None:
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


POLICIES = ("all-or-nothing", "skip-unsaveable", "force")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
pass_context = click.pass_context


async def _all_vms(client: Client) -> list[dict[str, Any]]:
    return [await client.properties(path, "VM") for _, _, path in await client.manager("ListVMs")]


@cli.command("list")
@json_option
@pass_context
def list_vms(context: click.Context, as_json: bool) -> None:
    """List all VMs and their states."""

    async def work(client: Client) -> int:
        _show(as_json, await _all_vms(client), tables.vms)
        return 0

    _run(context, work)


@cli.command()
@click.argument("vm", required=False)
@json_option
@pass_context
def status(context: click.Context, vm: str | None, as_json: bool) -> None:
    """Show one VM with its memory, checkpoint and problems, or the agent and all VMs."""

    async def work(client: Client) -> int:
        if vm:
            _show(as_json, await client.vm_properties(vm), tables.vm)
        else:
            about = await client.properties("/org/cpragent1", "Manager")
            _show(as_json, {**about, "VMs": await _all_vms(client)}, tables.agent)
        return 0

    _run(context, work)


@cli.command()
@click.argument("vm")
@json_option
@pass_context
def start(context: click.Context, vm: str, as_json: bool) -> None:
    """Start a VM afresh. Refused while it has a live checkpoint."""
    _act(context, vm, as_json, "started", "Start")


@cli.command()
@click.argument("vm")
@click.option("--hard", is_flag=True, help="Quit QEMU at once instead of pressing the power button.")
@json_option
@pass_context
def stop(context: click.Context, vm: str, hard: bool, as_json: bool) -> None:
    """Shut a VM down in order, and after its shutdown-timeout the hard way."""
    _act(context, vm, as_json, "stopped", "Stop", "s", "hard" if hard else "acpi")


@cli.command()
@click.argument("vm")
@json_option
@pass_context
def resume(context: click.Context, vm: str, as_json: bool) -> None:
    """Take a save back, or let a paused guest go on."""
    _act(context, vm, as_json, "resumed", "Resume")


@cli.command()
@click.argument("vm")
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
        _show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: {done}"))
        return 0

    _run(context, work)


@cli.command()
@click.argument("vm", required=False)
@json_option
@pass_context
def check(context: click.Context, vm: str | None, as_json: bool) -> None:
    """Say what would stop a save, or a load after a kexec. Stops nothing. Exits 4 if there is an error among it."""

    async def work(client: Client) -> int:
        found = plain(await (client.vm(vm, "Check") if vm else client.manager("Check", "a{sv}", {})))
        _show(as_json, found, tables.findings)
        return EXIT_REFUSED if any(finding["severity"] == "error" for finding in found) else 0

    _run(context, work)


@cli.command()
@click.argument("vm", required=False)
@click.option("--all", "every", is_flag=True, help="Save every VM that has a live guest: all, or none.")
@click.option("--file", "filename", default="", help="State file (default: the agent's own place).")
@click.option("--survives", type=click.Choice(["kexec", "qemu-restart"]), help="Refuse RAM that would not outlive this.")
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
            _show(as_json, await client.vm_properties(vm), lambda data: tables.saved(vm, data))
            return 0
        return await _follow_job(client, as_json, "SaveAll", {**wanted, **options(before_kexec=before_kexec or None)})

    _run(context, work)


@cli.command()
@click.argument("vm", required=False)
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
            _show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: loaded"))
            return 0
        return await _follow_job(client, as_json, "LoadAll", options(autostart=autostart))

    _run(context, work)


@cli.command()
@click.argument("vm", required=False)
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
            _show(as_json, await client.vm_properties(vm), lambda _: click.echo(f"{vm}: has a new QEMU"))
            return 0
        return await _follow_job(client, as_json, "RefreshAll", wanted)

    _run(context, work)


def _one_or_all(vm: str | None, every: bool) -> None:
    if bool(vm) == every:
        raise click.UsageError("name one VM, or give --all")


policy_option = click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="What to do with guests that can't be saved: refuse; shut them down in order; shut them down in any case.",
)
max_pause_option = click.option("--max-pause", type=float, metavar="S", help="Refuse if guests would pause longer (s).")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check, try to load the kernel, and stop there.")


@cli.command()
@click.option("--kernel", default="", metavar="V", help="Version of an installed kernel (default: the newest).")
@click.option("--kernel-image", default="", metavar="F", help="Another kernel's file, with --initrd.")
@click.option("--initrd", default="", metavar="F", help="The initrd of --kernel-image.")
@click.option("--append", default="", metavar="WORDS", help="The new command line; with --reuse-cmdline, added to it.")
@click.option("--reuse-cmdline", is_flag=True, help="Keep the running kernel's command line (the default).")
@click.option("--back", is_flag=True, help="Into the kernel before the last upgrade; guests not yet loaded come along.")
@policy_option
@max_pause_option
@dry_run_option
@json_option
@pass_context
def upgrade(context: click.Context, /, as_json: bool, **wishes: Any) -> None:
    """Start another kernel under all guests: check, save, kexec, load."""
    _upgrade(context, as_json, wishes)


@cli.command()
@policy_option
@max_pause_option
@dry_run_option
@json_option
@pass_context
def drill(context: click.Context, /, as_json: bool, **wishes: Any) -> None:
    """Rehearse an upgrade: the same, into the kernel that runs now. Its numbers tell how long the real one will take."""
    _upgrade(context, as_json, {**wishes, "drill": True})


def _upgrade(context: click.Context, as_json: bool, wishes: dict[str, Any]) -> None:
    wanted = options(**{name: value or None for name, value in wishes.items()})
    dry_run = bool(wishes.pop("dry_run"))

    async def work(client: Client) -> int:
        # Asked for in any case: a wish for the default is still one for an upgrade.
        found = plain(await client.manager("Check", "a{sv}", {**wanted, **options(dry_run=dry_run)}))
        refused = any(finding["severity"] == "error" for finding in found)
        if not as_json or refused:
            _show(as_json, found, tables.findings)
        if refused:
            click.echo("cprctl: refused; no guest was stopped", err=True)
            return EXIT_REFUSED
        try:
            status = await _follow_job(client, as_json, "Upgrade", wanted, quiet=True)
        except CallError as error:
            if error.kind != "AgentGone" or dry_run:
                raise
            status = 0 if "restarts" in str(error) else EXIT_FAILED
            text = "The host restarts; `cprctl status` tells how it went." if status == 0 else f"cprctl: {error}"
            click.echo(text, err=status != 0)
            return status
        if status == 0 and as_json:
            _show(True, found, tables.findings)
        elif status == 0:
            click.echo("The kernel can be loaded. No guest was stopped.")
        return status

    _run(context, work)


@cli.command()
@json_option
@pass_context
def rollback(context: click.Context, as_json: bool) -> None:
    """Take an upgrade back, until the host goes down: every saved guest goes on."""

    async def work(client: Client) -> int:
        return await _follow_job(client, as_json, "Rollback", None)

    _run(context, work)


async def _follow_job(
    client: Client, as_json: bool, member: str, wanted: dict[str, Any] | None, *, quiet: bool = False
) -> int:
    """Run a job with its steps on the screen, or each on a line of stderr for who reads a pipe."""
    if as_json:
        result = await client.run_job(member, wanted)
    else:
        with tables.progress() if sys.stderr.isatty() else _lines() as progress:
            result = await client.run_job(member, wanted, progress)
    return 0 if quiet and result == "done" else _report_job(as_json, result)


@contextlib.contextmanager
def _lines() -> Iterator[Callable[[str, float], None]]:
    told = ""

    def tell(step: str, done: float) -> None:  # noqa: ARG001 - there is no bar
        nonlocal told
        if step and step != told:
            click.echo(f"{step} ...", err=True)
            told = step

    yield tell


def _report_job(as_json: bool, result: str) -> int:
    if as_json:
        click.echo(json.dumps({"result": result}))
    elif result == "done":
        click.echo("done")
    else:
        click.echo(f"cprctl: {result}", err=True)
    return 0 if result == "done" else EXIT_FAILED


@cli.command()
@json_option
@pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List the persistent-memory devices, and who uses them."""

    async def work(client: Client) -> int:
        _show(as_json, plain(await client.manager("ListDevices")), tables.devices)
        return 0

    _run(context, work)


@cli.group()
def memory() -> None:
    """Find room for a guest's RAM."""


@memory.command("allocate")
@click.argument("vm")
@click.option("--size", default="", help="As 4G (default: that of the VM's definition).")
@click.option("--device", default="", help="On this device: its uuid, or its node (default: the best fit on any).")
@json_option
@pass_context
def memory_allocate(context: click.Context, vm: str, size: str, device: str, as_json: bool) -> None:
    """Print the [memory] section for a VM: a free, aligned range of a dax device. Reserves nothing."""

    async def work(client: Client) -> int:
        wanted = options(size=size or None, device=device or None)
        _show(as_json, plain(await client.manager("AllocateMemory", "sa{sv}", vm, wanted)), tables.memory)
        return 0

    _run(context, work)


@cli.command()
@json_option
@pass_context
def history(context: click.Context, as_json: bool) -> None:
    """Show each load with its guest's pause, split into phases."""

    async def work(client: Client) -> int:
        _show(as_json, plain(await client.manager("ListHistory")), tables.history)
        return 0

    _run(context, work)


@cli.command()
@pass_context
def reload(context: click.Context) -> None:
    """Read the definitions again."""

    async def work(client: Client) -> int:
        problems = await client.manager("Reload")
        for _, problem in problems:
            click.echo(f"cprctl: {problem}", err=True)
        return EXIT_FAILED if problems else 0

    _run(context, work)


def main() -> None:
    cli(prog_name="cprctl")

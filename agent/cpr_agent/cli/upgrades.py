# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about the host's kernel: upgrade, drill, rollback, and what they cost the guests."""

from __future__ import annotations

import sys
from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, JobEnd, options, plain
from cpr_agent.bus.library import Variant
from cpr_agent.cli.completion import job_argument, some_vm_argument
from cpr_agent.cli.jobs import follow, job_end, job_error
from cpr_agent.cli.session import EXIT_INTERRUPTED, Output, Work, command, tables
from cpr_agent.cli.terminal import wrapped
from cpr_agent.core.states import Policy, VmState
from cpr_agent.words import counted, length

policy_option = click.option(
    "--policy",
    type=click.Choice([policy.value for policy in Policy]),
    help="For guests that can't be saved: refuse; shut them down in order; shut them down in any case.",
)
max_pause_option = click.option("--max-pause", type=float, metavar="S", help="Refuse if guests would pause longer (s).")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check, try to load the kernel, and stop there.")
yes_option = click.option("--yes", is_flag=True, help="Don't ask. Only on a terminal cprctl does.")


@command()
@click.option("--kernel", default="", metavar="V", help="An installed version (default: newest of the running flavour).")
@click.option("--kernel-image", default="", metavar="F", help="Another kernel's file, with --initrd.")
@click.option("--initrd", default="", metavar="F", help="The initrd of --kernel-image.")
@click.option("--append", default="", metavar="WORDS", help="The new command line; with --reuse-cmdline, added to it.")
@click.option("--reuse-cmdline", is_flag=True, help="Keep the running kernel's command line (the default).")
@click.option("--back", is_flag=True, help="Into the kernel before the last upgrade; guests not yet loaded come along.")
@policy_option
@max_pause_option
@dry_run_option
@yes_option
def upgrade(*, yes: bool, **wishes: Any) -> Work:
    """Start another kernel under all guests: check, save, kexec, load."""
    return _upgrade(wishes, yes=yes)


@command()
@policy_option
@max_pause_option
@dry_run_option
@yes_option
def drill(*, yes: bool, **wishes: Any) -> Work:
    """Rehearse an upgrade: the same, into the kernel that runs now. Its numbers predict the real one's."""
    return _upgrade({**wishes, "drill": True}, yes=yes)


_UPGRADED = {
    "done": "The kernel can be loaded. No guest was stopped.",
    "the host restarts": "The host restarts. `cprctl status` shows how it went.",
}
_LIVE = (VmState.RUNNING, VmState.PAUSED, VmState.SUSPENDED, VmState.SAVED)


def _upgrade(wishes: dict[str, Any], *, yes: bool) -> Work:
    wanted = options(**{name: value or None for name, value in wishes.items()})
    dry_run = bool(wishes["dry_run"])

    async def work(client: Client, output: Output) -> int:
        # Check has an option in any case: without one it would check the VMs alone, and no upgrade.
        found = plain(await client.manager("Check", "a{sv}", {**wanted, **options(dry_run=dry_run)}))
        errors = [finding for finding in found if finding["severity"] == "error"]
        if not output.as_json:
            tables.findings(found)
        if errors:
            words = {"vm": errors[0]["vm"], "remedy": errors[0]["remedy"]}
            return output.error("UpgradeRefused", "refused; no guest was stopped", **words, findings=found)
        if not (yes or dry_run or output.as_json) and sys.stdin.isatty() and sys.stderr.isatty():
            click.confirm(await _question(client, wishes, found), abort=True, err=True)
        try:
            end = await job_end(client, output, "Upgrade", wanted)
        except CallError as error:
            if error.kind != "AgentGone" or dry_run or "restarts" not in str(error):
                raise
            end = JobEnd("the host restarts")
        if end is None:
            return EXIT_INTERRUPTED
        if end.result not in _UPGRADED:
            return job_error(output, end, findings=found)
        output.show({"result": end.result, "findings": found}, lambda _: click.echo(wrapped(_UPGRADED[end.result])))
        return 0

    return work


async def _question(client: Client, wishes: dict[str, Any], findings: list[dict[str, Any]]) -> str:
    """What is about to happen to which host, and to how many guests for how long."""
    about = await client.properties("/org/cpragent1", "Manager")
    states = [state for _, state, _ in await client.manager("ListVMs")]
    if wishes.get("drill"):
        kernel = about["Kernel"]
    elif wishes.get("back"):
        kernel = "the kernel before the last upgrade"
    else:
        kernel = wishes.get("kernel_image") or wishes.get("kernel") or next(iter(about["Kernels"]), "the newest kernel")
    guests = counted(sum(state in _LIVE for state in states), "guest")
    pauses = [one["seconds"] for one in findings if one["code"] == "predicted-pause" and "seconds" in one]
    pause = f", which pause for some {length(max(pauses))}" if pauses else ""
    return f"Restart {about['Hostname']} into {kernel} with {guests}{pause}?"


@command()
def rollback() -> Work:
    """Take an upgrade back, until the host goes down: every saved guest goes on."""
    return follow("Rollback", None)


@command()
@job_argument
def cancel(job: int) -> Work:
    """Cancel a job that `status` shows. An upgrade can be cancelled until it is committed; all its guests go on then."""

    async def work(client: Client, output: Output) -> int:
        try:
            await client.call(f"/org/cpragent1/job/{job}", "org.cpragent1.Job", "Cancel")
        except CallError as error:
            if error.kind != "org.freedesktop.DBus.Error.UnknownObject":
                raise
            raise CallError("NoSuchJob", f"no job {job}. See: cprctl status") from None
        output.show({"result": "done"}, lambda _: click.echo(f"job {job} is being cancelled"))
        return 0

    return work


@command()
@some_vm_argument
@click.option("-n", "--number", type=click.IntRange(1, 500), help="The newest loads alone, so many; 500 by default.")
def history(vm: str | None, number: int | None) -> Work:
    """List the newest loads of all VMs, or of one: a row each, with its guest's pause, the newest last."""

    async def work(client: Client, output: Output) -> int:
        wanted = {**options(vm=vm), **({"limit": Variant("u", number)} if number else {})}
        found = plain(await client.manager("ListHistory", "a{sv}", wanted))
        if vm and not found and vm not in [name for name, _, _ in await client.manager("ListVMs")]:
            raise CallError("NoSuchVM", "")
        output.show(found, tables.history)
        return 0

    return work


COMMANDS = (upgrade, drill, rollback, cancel, history)

"""Commands about the host's kernel: upgrade, drill, rollback, and what they cost the guests."""

from __future__ import annotations

from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, options, plain
from cpr_agent.cli.jobs import follow_job
from cpr_agent.cli.session import EXIT_FAILED, EXIT_REFUSED, json_option, pass_context, run, show, tables

POLICIES = ("all-or-nothing", "skip-unsaveable", "force")
policy_option = click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="What to do with guests that can't be saved: refuse; shut them down in order; shut them down in any case.",
)
max_pause_option = click.option("--max-pause", type=float, metavar="S", help="Refuse if guests would pause longer (s).")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check, try to load the kernel, and stop there.")


@click.command()
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


@click.command()
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
            show(as_json, found, tables.findings)
        if refused:
            click.echo("cprctl: refused; no guest was stopped", err=True)
            return EXIT_REFUSED
        try:
            status = await follow_job(client, as_json, "Upgrade", wanted, quiet=True)
        except CallError as error:
            if error.kind != "AgentGone" or dry_run:
                raise
            status = 0 if "restarts" in str(error) else EXIT_FAILED
            text = "The host restarts; `cprctl status` tells how it went." if status == 0 else f"cprctl: {error}"
            click.echo(text, err=status != 0)
            return status
        if status == 0 and as_json:
            show(True, found, tables.findings)
        elif status == 0:
            click.echo("The kernel can be loaded. No guest was stopped.")
        return status

    run(context, work)


@click.command()
@json_option
@pass_context
def rollback(context: click.Context, as_json: bool) -> None:
    """Take an upgrade back, until the host goes down: every saved guest goes on."""

    async def work(client: Client) -> int:
        return await follow_job(client, as_json, "Rollback", None)

    run(context, work)


@click.command()
@json_option
@pass_context
def history(context: click.Context, as_json: bool) -> None:
    """Show each load with its guest's pause, split into phases."""

    async def work(client: Client) -> int:
        show(as_json, plain(await client.manager("ListHistory")), tables.history)
        return 0

    run(context, work)


COMMANDS = (upgrade, drill, rollback, history)

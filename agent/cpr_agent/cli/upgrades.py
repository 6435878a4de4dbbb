"""Commands about the host's kernel: upgrade, drill, rollback, and what they cost the guests."""

from __future__ import annotations

from typing import Any

import click

from cpr_agent.bus.client import CallError, Client, JobEnd, options, plain
from cpr_agent.cli.jobs import follow_job, job_end, tell_job_error
from cpr_agent.cli.session import EXIT_INTERRUPTED, json_option, pass_context, run, show, tables, tell_error
from cpr_agent.core.states import Policy

policy_option = click.option(
    "--policy",
    type=click.Choice([policy.value for policy in Policy]),
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


_UPGRADED = {
    "done": "The kernel can be loaded. No guest was stopped.",
    "the host restarts": "The host restarts; `cprctl status` tells how it went.",
}


def _upgrade(context: click.Context, as_json: bool, wishes: dict[str, Any]) -> None:
    wanted = options(**{name: value or None for name, value in wishes.items()})
    dry_run = bool(wishes.pop("dry_run"))

    async def work(client: Client) -> int:
        # Asked for in any case: a wish for the default is still one for an upgrade.
        found = plain(await client.manager("Check", "a{sv}", {**wanted, **options(dry_run=dry_run)}))
        errors = [finding for finding in found if finding["severity"] == "error"]
        if not as_json:
            tables.findings(found)
        if errors:
            words = {"vm": errors[0]["vm"], "remedy": errors[0]["remedy"]}
            return tell_error(as_json, "UpgradeRefused", "refused; no guest was stopped", **words, findings=found)
        try:
            end = await job_end(client, as_json, "Upgrade", wanted)
        except CallError as error:
            if error.kind != "AgentGone" or dry_run or "restarts" not in str(error):
                raise
            end = JobEnd("the host restarts")
        if end is None:
            return EXIT_INTERRUPTED
        if end.result not in _UPGRADED:
            return tell_job_error(as_json, end, findings=found)
        show(as_json, {"result": end.result, "findings": found}, lambda _: click.echo(_UPGRADED[end.result]))
        return 0

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
@click.argument("job", type=click.IntRange(min=1))
@json_option
@pass_context
def cancel(context: click.Context, job: int, as_json: bool) -> None:
    """Cancel a job that is under way, as `status` shows it. An upgrade's guests all go on; until it is committed."""

    async def work(client: Client) -> int:
        await client.call(f"/org/cpragent1/job/{job}", "org.cpragent1.Job", "Cancel")
        show(as_json, {"result": "done"}, lambda _: click.echo(f"job {job} is being cancelled"))
        return 0

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


COMMANDS = (upgrade, drill, rollback, cancel, history)

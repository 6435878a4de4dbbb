# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about libvirt's domains: adopt one where it is, and give it back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from cpr_agent.bus.client import Client, options, plain
from cpr_agent.cli.completion import domain_argument, vm_argument
from cpr_agent.cli.session import Output, Work, command, complain


class Asked(NamedTuple):
    """The answers that the command line gives already."""

    dry_run: bool
    yes: bool


_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_dry_run = click.option("--dry-run", is_flag=True, help="Show the change, and stop there.")


@command()
@domain_argument
@click.option("--device", default="", help="Where its RAM shall be: uuid:…, a node, or a file (default: the best fit).")
@click.option("--offset", default="", help="Where in the device (default: a free range; of a file its start).")
@_dry_run
@_yes
def adopt(*, vm: str, device: str, offset: str, dry_run: bool, yes: bool) -> Work:
    """Make a libvirt domain a VM of the agent, where it is.

    Its guest must be shut off. Shows the change of its XML, and asks. It stays libvirt's: virsh and all that uses libvirt
    go on as before, and `cprctl upgrade` carries it with all other guests.
    """

    def done(change: dict[str, Any]) -> str:
        where = f"its RAM is {change['size'] >> 20} MiB of {change['device']} from offset {change['offset']}"
        return f"{vm}: adopted; {where}\nNext: cprctl check {vm}; virsh start {vm}"

    return _change("Adopt", vm, {"device": device, "offset": offset}, done, Asked(dry_run, yes))


@command()
@vm_argument
@_dry_run
@_yes
def release(*, vm: str, dry_run: bool, yes: bool) -> Work:
    """Give an adopted domain back to libvirt alone, as it was.

    Its guest must be shut off. Shows the change of its XML, and asks.
    """

    def done(change: dict[str, Any]) -> str:
        device = change.get("device", "")
        left = f"; its memory file {device} is left" if device.startswith("/") and not device.startswith("/dev/dax") else ""
        return f"{vm}: released{left}"

    return _change("Release", vm, {}, done, Asked(dry_run, yes))


def _change(member: str, domain: str, wanted: dict[str, str], done: Callable[[dict[str, Any]], str], asked: Asked) -> Work:
    """Show the change, ask, and make exactly that change."""
    dry_run, yes = asked
    if not (dry_run or yes or sys.stdin.isatty()):
        raise click.UsageError("nobody can be asked here: give --yes, or --dry-run")

    async def work(client: Client, output: Output) -> int:
        change = plain(await client.manager(member, "sa{sv}", domain, options(**wanted, dry_run=True)))
        if not output.as_json:
            click.echo(change["diff"], nl=False)
        if not (dry_run or yes):
            click.confirm("Change the domain so?", abort=True, err=True)
        if not dry_run:
            wanted["token"] = change["token"]
            change = plain(await client.manager(member, "sa{sv}", domain, options(**wanted)))
        shown = {**change, "vm": domain, "done": not dry_run}
        output.show(shown, lambda _: complain("nothing was changed") if dry_run else click.echo(done(change)))
        return 0

    return work


COMMANDS = (adopt, release)

"""cprctl: what an admin types."""

from __future__ import annotations

import click

from cpr_agent import __version__
from cpr_agent.cli import definitions, memory, report, upgrades, vms

EPILOG = """Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such VM, checkpoint or report, 4 refused by a check or a
proof, 5 no agent to talk to, 77 not allowed."""


@click.group(epilog=EPILOG)
@click.option("--bus-address", envvar="CPR_AGENT_BUS_ADDRESS", help="D-Bus address (default: the system bus).")
@click.version_option(__version__, prog_name="cprctl")
@click.pass_context
def cli(context: click.Context, bus_address: str | None) -> None:
    """Administer cpr-agent: VMs whose RAM outlives their QEMU and their host's kernel."""
    context.obj = bus_address


for _command in (*vms.COMMANDS, *upgrades.COMMANDS, *report.COMMANDS, *memory.COMMANDS, *definitions.COMMANDS):
    cli.add_command(_command)


def main() -> None:
    cli(prog_name="cprctl")

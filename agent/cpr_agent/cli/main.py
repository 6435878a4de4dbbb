# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl, the admin's command."""

from __future__ import annotations

import sys

import click

from cpr_agent import __version__
from cpr_agent.cli import definitions, domains, memory, report, upgrades, vms
from cpr_agent.cli.session import Output, Target

EPILOG = """Exit codes: 0 done, 1 failed, 2 nothing to do, 3 no such VM, checkpoint or report, 4 refused by a check or a
proof, 5 no agent to talk to, 64 wrong usage, 77 not allowed, 130 interrupted."""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bus-address", envvar="CPR_AGENT_BUS_ADDRESS", help="D-Bus address (default: the system bus).")
@click.option("-H", "--host", default="", metavar="USER@HOST", help="Another host's agent, by ssh; also USER@HOST:PORT.")
@click.version_option(__version__, prog_name="cprctl")
@click.pass_context
def cli(context: click.Context, bus_address: str | None, host: str) -> None:
    """Administer cpr-agent: VMs whose RAM outlives their QEMU and their host's kernel."""
    context.obj = Target(None if host else bus_address, host)


for _command in (
    *vms.COMMANDS,
    *upgrades.COMMANDS,
    *report.COMMANDS,
    *memory.COMMANDS,
    *definitions.COMMANDS,
    *domains.COMMANDS,
):
    cli.add_command(_command)


def main() -> None:
    """Exits with our own codes: click's 2 for wrong usage means "nothing to do" here."""
    output = Output(as_json="--json" in sys.argv)
    try:
        sys.exit(cli.main(prog_name="cprctl", standalone_mode=False))
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and newer; older ones exit with 0 here
            error.show()
            sys.exit(0)
        if error.ctx:
            click.echo(error.ctx.get_usage(), err=True)
        sys.exit(output.error("Usage", error.format_message()))
    except click.ClickException as error:
        sys.exit(output.error("Failed", error.format_message()))
    except click.Abort:
        sys.exit(output.error("Aborted", "nothing was done"))

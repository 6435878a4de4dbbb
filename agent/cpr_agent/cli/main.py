# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl, the admin's command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import click

from cpr_agent import __version__
from cpr_agent.cli import definitions, domains, memory, report, upgrades, vms
from cpr_agent.cli.session import Output, Target
from cpr_agent.cli.terminal import fit_for_any_terminal, nearest

EPILOG = """Exit codes: 0 done, 1 failed, 2 nothing to do, 3 no such VM, checkpoint or report, 4 refused by a check or a
proof, 5 no agent to talk to, 64 wrong usage, 77 not allowed, 130 interrupted."""

SECTIONS = {
    "Looking": ("list", "status", "check", "devices", "history", "report"),
    "VMs": ("start", "stop", "save", "load", "resume", "refresh", "discard"),
    "The host's kernel": ("upgrade", "drill", "rollback", "cancel"),
    "Definitions": ("edit", "reload", "import", "memory"),
    "Domains of libvirt": ("adopt", "release"),
}
"""Of `cprctl --help`."""
HABITS: Mapping[str, str] = {
    "destroy": "`cprctl stop --hard VM` ends a guest at once; `cprctl discard VM` gives a saved one up",
    "shutdown": "`cprctl stop VM` presses a guest's power button",
    "poweroff": "`cprctl stop VM` presses a guest's power button",
    "undefine": "remove the VM's file from /etc/cpr-agent/vms, then `cprctl reload`",
    "define": "`cprctl edit VM` makes a definition, `cprctl import` takes one over",
    "create": "`cprctl edit VM` makes a definition, `cprctl start VM` boots it",
    "reboot": "`cprctl stop VM`, then `cprctl start VM`; its guest can reboot by itself",
    "restore": "`cprctl load VM` lets a saved guest go on",
    "suspend": "`cprctl save VM` saves a guest; on the admin's QMP socket `stop` pauses it",
    "show": "`cprctl status VM`",
    "info": "`cprctl status VM`",
    "dominfo": "`cprctl status VM`",
    "ps": "`cprctl list`",
    "dumpxml": "a definition is TOML: `cprctl edit VM` opens it, in /etc/cpr-agent/vms",
    "console": "QEMU's command line says where a VM's console is: `cprctl edit VM` shows it",
    "jobs": "`cprctl status`",
    "log": "`journalctl -u cpr-agent`; QEMUs' words are in /var/log/cpr-agent",
}
"""Commands of other programs, and what does the same here."""


class Commands(click.Group):
    """In sections, each with the whole first sentence of its help; and a word for who has typed another one."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        for section, names in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        hint = f": {HABITS[name]}" if name in HABITS else nearest(name, self.commands) or ". See: cprctl help"
        raise click.UsageError(f"there is no command {name}{hint}", ctx)


def _first_sentence(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


@click.group(
    cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}, options_metavar="[OPTIONS]"
)
@click.option("--bus-address", envvar="CPR_AGENT_BUS_ADDRESS", help="D-Bus address (default: the system bus).")
@click.option("-H", "--host", default="", metavar="USER@HOST", help="Another host's agent, by ssh; also USER@HOST:PORT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; may stand after the command as well.")
@click.version_option(__version__, prog_name="cprctl")
@click.pass_context
def cli(context: click.Context, bus_address: str | None, host: str, *, as_json: bool) -> None:
    """Administer cpr-agent: VMs whose RAM outlives their QEMU and their host's kernel."""
    context.obj = Target(None if host else bus_address, host, as_json)


for _command in (
    *vms.COMMANDS,
    *upgrades.COMMANDS,
    *report.COMMANDS,
    *memory.COMMANDS,
    *definitions.COMMANDS,
    *domains.COMMANDS,
):
    cli.add_command(_command)


@cli.command("help")
@click.argument("command", required=False, metavar="[COMMAND]")
@click.pass_context
def help_(context: click.Context, command: str | None) -> None:
    """Show this help, or that of a command."""
    above = context.find_root()
    if command is None:
        click.echo(above.get_help())
        return
    name, found, _ = cli.resolve_command(above, [command])
    if found:
        click.echo(found.get_help(click.Context(found, info_name=name, parent=above)))


def main() -> None:
    """Exits with our own codes: click's 2 for wrong usage means "nothing to do" here."""
    fit_for_any_terminal()
    output = Output(as_json="--json" in sys.argv)
    try:
        code = cli.main(prog_name="cprctl", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever reads has seen enough, as head(1) has; click does likewise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and newer; older ones print it, and exit with 0
            click.echo(error.format_message())
            sys.exit(0)
        if error.ctx:
            click.echo(error.ctx.get_usage(), err=True)
        sys.exit(output.error("Usage", error.format_message()))
    except click.ClickException as error:
        sys.exit(output.error("Failed", error.format_message()))
    except click.Abort:
        sys.exit(output.error("Aborted", "nothing was done"))

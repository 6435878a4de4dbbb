"""Commands about VM definitions."""

from __future__ import annotations

import click

from cpr_agent.bus.client import Client
from cpr_agent.cli.session import EXIT_FAILED, json_option, pass_context, run, show


@click.command()
@json_option
@pass_context
def reload(context: click.Context, as_json: bool) -> None:
    """Read the definitions again. Exits 1 if one can't be used."""

    async def work(client: Client) -> int:
        problems = [{"vm": vm, "problem": problem} for vm, problem in await client.manager("Reload")]
        show(as_json, problems, lambda _: None)
        for problem in problems:
            click.echo(f"cprctl: {problem['problem']}", err=True)
        return EXIT_FAILED if problems else 0

    run(context, work)


COMMANDS = (reload,)

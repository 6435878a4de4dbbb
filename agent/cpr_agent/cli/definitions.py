"""Commands about VM definitions."""

from __future__ import annotations

import click

from cpr_agent.bus.client import Client
from cpr_agent.cli.session import EXIT_FAILED, pass_context, run


@click.command()
@pass_context
def reload(context: click.Context) -> None:
    """Read the definitions again."""

    async def work(client: Client) -> int:
        problems = await client.manager("Reload")
        for _, problem in problems:
            click.echo(f"cprctl: {problem}", err=True)
        return EXIT_FAILED if problems else 0

    run(context, work)


COMMANDS = (reload,)

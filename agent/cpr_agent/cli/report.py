# SPDX-License-Identifier: GPL-2.0-or-later
"""The command that shows how an upgrade or a load went."""

from __future__ import annotations

import json
from typing import Any

import click

from cpr_agent.bus.client import Client
from cpr_agent.cli.completion import report_argument
from cpr_agent.cli.session import Output, Work, command, target


@command()
@report_argument
@click.option("--svg", is_flag=True, help="Print the timeline as a picture.")
@click.option("--html", is_flag=True, help="Print a page that stands alone.")
@click.option("--blame", is_flag=True, help="Show who cost the pause, each with its seconds, and what helps.")
def report(*, wanted: str, svg: bool, html: bool, blame: bool) -> Work:
    """Show how an upgrade or a load went, as a timeline. ID is from `history`, or its beginning; default: the last."""
    as_json = click.get_current_context().params["as_json"] or target().as_json
    if svg + html + (blame or as_json) > 1:
        raise click.UsageError("choose one of --json, --svg, --html and --blame")
    form = "svg" if svg else "html" if html else ""

    async def work(client: Client, output: Output) -> int:
        text = await client.manager("Report", "ss", wanted, form or "json")
        if form:
            click.echo(text)
        else:
            output.show(json.loads(text), _blame if blame else _draw)
        return 0

    return work


def _draw(story: dict[str, Any]) -> None:
    from cpr_agent.cli import timeline  # it imports rich, which takes long: as in session.tables

    timeline.show(story)


def _blame(story: dict[str, Any]) -> None:
    from cpr_agent.cli import timeline  # likewise

    timeline.blame(story)


COMMANDS = (report,)

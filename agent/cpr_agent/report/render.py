# SPDX-License-Identifier: GPL-2.0-or-later
"""A story as JSON, as a picture, as a page that stands alone. The only importer of jinja2.

All text in a document is escaped, and characters that no document may have are replaced: names and messages come from
definitions, kernels and QEMU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from cpr_agent.core.upgrade import blame
from cpr_agent.core.upgrade.ledger import Kind, Phase
from cpr_agent.errors import InvalidArgument
from cpr_agent.report.phases import KERNEL, LOOKS, look_of
from cpr_agent.report.picture import draw
from cpr_agent.report.story import LOAD, GuestStory, Outcome, Story
from cpr_agent.words import length, moment, printable, size

FORMATS = ("json", "svg", "html")
KINDS: Mapping[str, str] = {
    Kind.UPGRADE: "Upgrade",
    Kind.DRILL: "Drill",
    Kind.BACK: "Way back",
    Kind.KEXEC: "Kexec",
    Kind.SOFT_REBOOT: "Soft reboot",
    Kind.SAVE_ALL: "Save of all guests",
}


class Verdict(NamedTuple):
    tone: str
    word: str
    text: str


def render(story: Story, form: str) -> str:
    """Raises InvalidArgument."""
    if form == "json":
        return json.dumps(document(story), indent=2)
    if form not in FORMATS:
        raise InvalidArgument(
            f"there is no format {form!r}", left="nothing was reported", remedy=f"use {', '.join(FORMATS)}"
        )
    page = _environment()
    about = {
        "headline": headline(story),
        "subtitle": _subtitle(story),
        "picture": draw(story),
        "looks": [*LOOKS.values(), KERNEL],
    }
    svg = str(page.get_template("timeline.svg").render(**about, alone=form == "svg"))
    if form == "svg":
        return svg
    whole = page.get_template("report.html").render(
        **about,
        svg=svg,
        story=story,
        verdict=verdict(story),
        remarks=_remarks(story),
        columns=_columns(story),
        details=[guest for guest in story.guests if guest.timeline and guest.timeline.memory],
        facts=_facts(story),
        blame=blame.findings(story.costs),
    )
    return str(whole)


def document(story: Story) -> dict[str, Any]:
    """docs/insight.md describes its fields."""
    out: dict[str, Any] = msgspec.to_builtins(story)
    out["blame"] = [msgspec.to_builtins(finding) for finding in blame.findings(story.costs)]
    out |= {"headline": headline(story), "verdict": verdict(story)._asdict(), "remarks": _remarks(story)}
    for guest in out["guests"]:
        timeline = guest.pop("timeline") or {}
        guest["about"] = {key: value for key, value in timeline.items() if key in _ABOUT}
    return out


_ABOUT = (
    "id",
    "run_state",
    "qemu_before",
    "qemu_after",
    "witness",
    "state_bytes",
    "memory",
    "memory_bytes",
    "clock_behind_s",
    "clock_problem",
    "hook_problems",
    "by_kexec",
)


def headline(story: Story) -> str:
    kind = KINDS.get(story.kind, story.kind)
    if story.kind == LOAD and story.guests:
        kind = f"Load of {story.guests[0].vm}"
    if story.kernel_before == story.kernel_after:
        if story.kernel_planned not in ("", story.kernel_after):
            return f"{kind} to {story.kernel_planned}: the host is on {story.kernel_after}"
        return f"{kind} on kernel {story.kernel_after}"
    return f"{kind}: {story.kernel_before} → {story.kernel_after}"


def verdict(story: Story) -> Verdict:
    """The outcome, in a sentence."""
    through = story.of(Outcome.WENT_ON)
    words = [f"{len(through)} of {len(story.guests)} guests went on" if story.guests else "no guest was stopped"]
    if story.guests and story.outcome == Phase.ROLLED_BACK and not through:
        words = ["everything was taken back"]
    if story.longest and story.longest.pause_s is not None:
        words.append(f"the longest pause was {length(story.longest.pause_s)} ({story.longest.vm})")
    words += [f"{len(some)} {outcome}" for outcome in _LESSER if (some := story.of(outcome))]
    held = story.outcome == Phase.HELD or story.of(Outcome.HELD)
    tone = "bad" if held else "good" if story.outcome == Phase.DONE else "fair"
    return Verdict(tone, story.outcome.replace("-", " ").capitalize() + ".", _sentence("; ".join(words)))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


_LESSER = (
    Outcome.HELD,
    Outcome.SAVED,
    Outcome.NOT_SAVED,
    Outcome.RESUMED,
    Outcome.SHUT_DOWN,
    Outcome.BOOTED_ANEW,
)


def _subtitle(story: Story) -> str:
    how = verdict(story)
    return f"{story.host} · {moment(story.started_at)} · {how.word.rstrip('.').lower()} · {how.text.rstrip('.')}"


def _remarks(story: Story) -> list[str]:
    """The reasons and failures that no guest's section has."""
    explained = tuple(f"VM {guest.vm}: " for guest in story.guests if guest.why)
    failures = [failure for failure in story.failures if not failure.startswith(explained)]
    hooks = [f"{g.vm}: {problem}" for g in story.guests if g.timeline for problem in g.timeline.hook_problems]
    return [remark for remark in (story.reason, *failures, *hooks) if remark]


def _columns(story: Story) -> list[str]:
    """Each phase that a guest went through, in the order of the guest with most of them."""
    longest = max(story.guests, key=lambda guest: len(guest.spans), default=None)
    names = [span.name for span in longest.spans] if longest else []
    return list(dict.fromkeys([*names, *(span.name for guest in story.guests for span in guest.spans)]))


def _facts(story: Story) -> list[tuple[str, str]]:
    facts = [
        ("Host", story.host),
        ("Began", moment(story.started_at)),
        ("Took", length(story.ended_at - story.started_at)),
        ("Kernel before", story.kernel_before),
        ("Kernel after", story.kernel_after),
        ("Kernel planned", story.kernel_planned),
        ("QEMU before", _several(g.timeline.qemu_before for g in story.guests if g.timeline)),
        ("QEMU after", _several(g.timeline.qemu_after for g in story.guests if g.timeline)),
        ("Witness of guests' memory", _several(g.timeline.witness for g in story.guests if g.timeline)),
        ("Policy", story.policy),
        *((f"Host: {span.name}", length(span.length_s)) for span in story.phases),
    ]
    return [(name, value) for name, value in facts if value]


def _several(values: Any) -> str:
    return ", ".join(sorted({str(value) for value in values if value}))


def _phase_of(guest: GuestStory, name: str) -> str:
    found = [span for span in guest.spans if span.name == name]
    return length(sum(span.length_s for span in found)) if found else ""


def _environment() -> Any:
    """Made anew for each report. jinja2 is imported here: guests wait for the agent's start, which goes without it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cpr_agent.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(length_of=length, size_of=size, look=look_of, phase=_phase_of)
    return environment

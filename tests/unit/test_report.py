# SPDX-License-Identifier: GPL-2.0-or-later
"""What is told of an upgrade or a load: the story, the picture of it, and what is written down of that."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from msgspec.structs import replace

from cpr_agent.core.model import Bytes
from cpr_agent.core.timeline import COSTS, INITRD, KERNEL, PURGATORY, Cost, GuestTimeline, Part
from cpr_agent.errors import InvalidArgument, NoSuchReport
from cpr_agent.report.phases import KERNEL as KERNEL_LOOK
from cpr_agent.report.phases import LOOKS, look_of
from cpr_agent.report.picture import draw, ticks
from cpr_agent.report.render import render, verdict
from cpr_agent.report.story import Outcome, Story, list_stories, story_of
from cpr_agent.store import history as store_history
from cpr_agent.store.history import History
from cpr_agent.words import exact_size, length, size
from tests.stories import T0, UPGRADE, told, upgrade

SVG = "{http://www.w3.org/2000/svg}"


LOADED = ("load_at", "memory_at", "loaded_at", "resumed_at")


def names(story: Story) -> list[str]:
    return [span.name for span in story.phases]


def without_overlap(spans: Any) -> bool:
    return all(a.end == b.begin and a.length_s >= 0 for a, b in pairwise(spans))


def test_an_upgrade_is_told_with_the_phases_of_its_host_and_guests() -> None:
    story = told(3)
    assert (story.id, story.kind, story.outcome) == (UPGRADE, "upgrade", "done")
    assert names(story) == [
        *("check", "save", "shutdown", "kexec + kernel", "userspace", "devices", "load", "resume"),
    ]
    assert without_overlap(story.phases)
    assert [guest.vm for guest in story.guests] == ["web1", "web2", "web3"]
    for guest in story.guests:
        assert without_overlap(guest.spans)
        assert sum(span.length_s for span in guest.spans) == pytest.approx(guest.pause_s)
    assert story.longest and story.longest.vm == "web1"
    assert verdict(story).text == "3 of 3 guests went on; the longest pause was 25.3 s (web1)."


def test_a_guest_that_is_held_is_told_with_why_and_what_was_found() -> None:
    story = told(3, held=("web2",))
    (held,) = story.of(Outcome.HELD)
    assert (held.vm, held.pause_s) == ("web2", None)
    assert "contents of its memory" in held.why
    assert held.evidence[0][0] == "witness of 4096 pages"
    assert [span.name for span in held.spans][:4] == ["save", "shutdown", "kexec + kernel", "userspace"]
    assert verdict(story).tone == "bad"
    page = render(story, "html")
    assert page.count("the contents of its memory are not what they were") == 1


def test_all_guests_held_is_a_report_too() -> None:
    story = told(2, held=("web1", "web2"))
    assert len(story.of(Outcome.HELD)) == 2
    assert "shutdown + kexec + kernel" in names(story)
    render(story, "html")


def taken_back() -> Story:
    records = upgrade(2)[0]
    records = [r for r in records if r["at"] < T0 + 1.9]
    more: list[dict[str, Any]] = [
        {"event": "upgrade-rolling-back", "upgrade": UPGRADE, "at": T0 + 2, "reason": "disk full"},
        *({"event": "rollback", "vm": vm, "at": T0 + 2.1, "checkpoint": f"id-{vm}"} for vm in ("web1", "web2")),
        *({"event": "resumed", "vm": vm, "at": T0 + 2.2, "checkpoint": f"id-{vm}"} for vm in ("web1", "web2")),
        {"event": "upgrade-rolled-back", "upgrade": UPGRADE, "at": T0 + 2.3, "failures": []},
    ]
    return story_of("", [*records, *more], [], "host")


def test_what_was_taken_back_is_told_by_the_journal_alone() -> None:
    story = taken_back()
    assert (story.outcome, story.reason, names(story)) == ("rolled-back", "disk full", ["check", "save", "take back"])
    assert {guest.outcome for guest in story.guests} == {"resumed"}
    assert story.longest and story.longest.pause_s == pytest.approx(2.18, abs=0.01)
    assert "disk full" in render(story, "html")


CHECKING: dict[str, Any] = {"event": "upgrade-checking", "upgrade": "u1", "kind": "upgrade", "kernel_from": "6.1"}


@pytest.mark.parametrize(
    "facts",
    [
        {"event": "upgrade-teleporting"},
        {"event": "upgrade-teleporting", "upgrade": "u9"},
        {"event": "upgrade-checking", "upgrade": "u9"},
        {"event": "upgrade-done"},
        {**CHECKING, "upgrade": "u9", "kind": "teleport"},
        {**CHECKING, "upgrade": ["u9"]},
        {**CHECKING, "upgrade": "u9", "at": 1e308},
        {**CHECKING, "upgrade": "u9", "at": -1e308},
        {**CHECKING, "upgrade": "u9", "at": 10**400},
        {"event": "upgrade-booted", "upgrade": "u1", "userspace_at": "soon"},
        {"event": "upgrade-booted", "upgrade": "u1", "at": True},
        {"event": "upgrade-done", "upgrade": "u1", "failures": 7},
        {"event": "upgrade-done", "upgrade": "u1", "failures": [{"a": [1]}]},
        {"event": "upgrade-done", "upgrade": "u1", "shut_down": 7},
        {"event": "upgrade-refused", "upgrade": "u1", "reason": {"a": 1}},
        {"event": "save-begin"},
        {"event": "save-begin", "vm": {"a": 1}},
        {"event": "held", "vm": "web1"},
        {"event": "held", "vm": "web1", "reason": 5, "evidence": [1]},
        {"event": "memory-lost", "vm": "web1"},
        {"event": "saved", "vm": "web1", "stopped_at": [3]},
    ],
    ids=str,
)
def test_what_a_newer_agent_has_recorded_hides_no_other_report(facts: dict[str, Any]) -> None:
    """An agent that came back after an upgrade of its own finds such records."""
    begun = [{**CHECKING, "at": T0}, {"event": "save-begin", "vm": "web1", "at": T0 + 1}]
    records = [*begun, {"at": T0 + 2, **facts}, {"event": "upgrade-held", "upgrade": "u1", "at": T0 + 3}]
    (entry,) = list_stories(records, [], 50, 0.0)
    assert (entry.id, entry.kind, entry.outcome) == ("u1", "upgrade", "held")
    for name in ("json", "svg", "html"):
        assert render(story_of("", records, [], "host"), name)


def test_a_refused_upgrade_has_no_guests() -> None:
    records = [r for r in upgrade(2)[0] if r["event"] == "upgrade-checking"]
    refused = {"event": "upgrade-refused", "upgrade": UPGRADE, "at": T0, "reason": "cpr-gate.service is disabled"}
    story = story_of("", [*records, refused], [], "host")
    assert (story.outcome, story.guests, names(story)) == ("refused", (), ["check"])
    assert "cpr-gate.service is disabled" in render(story, "html")
    ElementTree.fromstring(render(story, "svg"))  # noqa: S314 - our own


def by_itself() -> Story:
    single = replace(upgrade(1)[1][0], id="feedbeef00", upgrade="", userspace_at=0.0, shutdown_at=0.0)
    return story_of("feed", [], [single], "host")


def test_a_load_by_itself_is_a_report() -> None:
    story = by_itself()
    assert (story.kind, story.phases) == ("load", story.guests[0].spans)
    assert names(story) == ["save", "saved", "devices", "load", "resume"]


@pytest.mark.parametrize(
    ("wanted", "said"), [("nope", "there is no report 'nope'"), ("a5c", "there is no report"), ("id-w", "begins")]
)
def test_an_unknown_id_is_told_with_those_that_are_known(wanted: str, said: str) -> None:
    records, timelines = upgrade(2)
    singles = [replace(t, upgrade="", id=f"{t.id}-again", stopped_at=t.stopped_at + 900) for t in timelines]
    with pytest.raises(NoSuchReport, match=said.replace("begins", "2 reports have an id that begins")) as caught:
        story_of(wanted, records, [*timelines, *singles], "host")
    assert "id-web1-again" in caught.value.remedy
    assert story_of("a5c1", records, timelines, "host").id == UPGRADE


def test_nothing_on_record_is_told_as_that() -> None:
    with pytest.raises(NoSuchReport, match="nothing was upgraded or loaded"):
        story_of("", [], [], "host")


def test_what_is_told_of_can_be_listed_newest_first() -> None:
    """Upgrades that went through, that were refused, and that are under way; and loads that were part of none."""
    records, timelines = upgrade(2)
    later = [
        {**records[0], "at": T0 + 500.0, "upgrade": "b" * 32},
        {**records[0], "at": T0 + 501.0, "upgrade": "b" * 32, "event": "upgrade-refused", "reason": "no room"},
        {**records[0], "at": T0 + 600.0, "upgrade": "c" * 32},
    ]
    alone = replace(timelines[0], id="feed", upgrade="", stopped_at=T0 + 550.0, resumed_at=T0 + 551.5)
    found = list_stories([*records, *later], [*timelines, alone], 10, 0.0)
    assert [(one.id, one.kind, one.outcome) for one in found] == [
        ("c" * 32, "upgrade", "checking"),
        ("feed", "load", "done"),
        ("b" * 32, "upgrade", "refused"),
        (UPGRADE, "upgrade", "done"),
    ]
    under_way, load, refused, done = found
    assert (under_way.ended_at, under_way.longest_pause_s, under_way.vms) == (0.0, None, ())
    assert (load.longest_pause_s, load.vms) == (1.5, (alone.vm,))
    assert (refused.reason, refused.ended_at, refused.kernel_after) == ("no room", T0 + 501.0, "6.12.43")
    assert (done.kernel_after, done.vms) == ("6.12.57", ("web1", "web2"))
    assert done.longest_pause_s == max(timeline.pause_s for timeline in timelines)
    assert list_stories([*records, *later], [*timelines, alone], 2, found[0].started_at) == found[1:3]


def test_the_newest_load_of_a_vm_is_known_once_the_history_was_read(tmp_path: Path) -> None:
    _, timelines = upgrade(2)
    History(tmp_path).add(timelines[0])
    history = History(tmp_path)
    assert history.last("web1") is None
    history.all()
    assert history.last("web1") == timelines[0]
    newer = replace(timelines[0], id="newer", resumed_at=timelines[0].resumed_at + 60)
    history.add(newer)
    history.add(replace(timelines[0], id="older", resumed_at=timelines[0].resumed_at - 60))
    assert history.last("web1") == newer


def test_records_of_an_older_agent_are_read(tmp_path: Path) -> None:
    """As 0.1.0's first loads wrote them: without what was added since."""
    (timeline,) = upgrade(1)[1]
    added = ("loaded_at", "run_state", "qemu_before", "qemu_after", "witness", "state_bytes", "memory", "memory_bytes")
    old = {key: value for key, value in msgspec.to_builtins(timeline).items() if key not in added}
    (tmp_path / "old.json").write_bytes(msgspec.json.encode(old))
    (read,) = History(tmp_path).all()
    assert [name for name, _ in read.phases()][-2:] == ["devices", "load"]
    story = story_of("", [], [replace(read, upgrade="")], "host")
    render(story, "html")


def test_the_oldest_timelines_make_room_for_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_history, "KEPT", 2)
    (one,) = upgrade(1)[1]
    for number in range(5):
        History(tmp_path).add(replace(one, id=f"id-{number}", resumed_at=one.resumed_at + number))
    again = History(tmp_path)
    again.all()
    for number in (6, 5):  # the first is newer than the second, which is added later
        again.add(replace(one, id=f"id-{number}", resumed_at=one.resumed_at + number))
    assert [timeline.id for timeline in again.all()] == ["id-5", "id-6"]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["id-5", "id-6"]


def test_a_clock_that_went_back_across_the_kexec_turns_no_phase_around() -> None:
    records, timelines = upgrade(2)
    wrong = [replace(t, userspace_at=t.shutdown_at - 1.0) for t in timelines]
    booted = [{**r, "userspace_at": T0 + 5.0} if r["event"] == "upgrade-booted" else r for r in records]
    story = story_of("", booted, wrong, "host")
    assert without_overlap(story.phases)
    assert all(without_overlap(guest.spans) for guest in story.guests)


def test_a_guest_that_was_loaded_days_later_does_not_stretch_the_picture() -> None:
    records, timelines = upgrade(3, held=("web2",))
    late = replace(timelines[0], id="id-web2", vm="web2", **dict.fromkeys(LOADED, T0 + 2 * 86400))
    story = story_of("", records, [*timelines, late], "host")
    picture = draw(story)
    row = next(row for row in picture.rows if row.name == "web2")
    assert row.open_x > 0
    assert row.text == "2 d 00 h"
    assert max(tick.x for tick in picture.ticks) <= picture.right
    assert all(row.text_x < picture.width for row in picture.rows)


@pytest.mark.parametrize("count", [1, 3, 20, 64])
def test_bars_stand_below_each_other_and_inside_the_picture(count: int) -> None:
    picture = draw(told(count, names="a-guest-with-a-rather-long-name-{}"))
    assert len(picture.rows) == count
    tops = [row.y for row in picture.rows]
    assert tops == sorted(tops)
    assert tops[-1] + picture.rows[-1].height <= picture.bottom
    for row in picture.rows:
        assert all(picture.left - 0.01 <= box.x and box.x + box.width <= picture.right + 1.01 for box in row.boxes)
        assert picture.font * 0.58 * len(row.name) <= picture.left
    assert picture.height < 1600


@pytest.mark.parametrize(
    ("begin", "end", "labels"),
    [
        (-3.0, 26.0, ["0 s", "5 s", "10 s", "15 s", "20 s", "25 s"]),
        (0.0, 0.9, ["0.0 s", "0.1 s", "0.2 s"]),
        (-10, 190.0, ["0 s", "30 s", "1:00 min", "1:30 min"]),
        (0, 7200, ["0 s", "15:00 min", "30:00 min"]),
        (0, 86400 * 3, ["0 s", "12 h", "24 h"]),
    ],
)
def test_the_axis_has_round_moments(begin: float, end: float, labels: list[str]) -> None:
    shown = ticks(begin, end)
    assert [label for at, label in shown if at >= 0][: len(labels)] == labels
    assert 4 <= len(shown) <= 12


def lightness(colour: str) -> float:
    """0 to 1, as a printer without colours has it (ITU-R BT.601)."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phases_that_follow_each_other_differ_without_colours(scheme: str) -> None:
    light, _, dark = render(told(1), "svg").partition("@media")
    rule = r"^\s*([^{}]*\.cpr-%s\b[^{}]*) \{ fill: (#\w{6}); \}"

    def fill(css: str) -> float:
        found = [
            colour
            for part in (light, dark if scheme == "dark" else "")
            for _, colour in re.findall(rule % css, part, re.MULTILINE)
        ]
        return lightness(found[-1])

    ways = [[look_of(name).css for name in way] for way in WAYS]
    for way in ways:
        for one, other in pairwise(way):
            assert abs(fill(one) - fill(other)) > 0.2, (one, other)


def test_phases_are_told_apart_by_what_they_are_drawn_with() -> None:
    looks = [*LOOKS.values(), KERNEL_LOOK]
    assert len({look.css for look in looks}) == len({look.letter for look in looks}) == len(looks)
    for story in (told(3), told(2, held=("web1", "web2")), taken_back(), by_itself()):
        for name in [*names(story), *(span.name for guest in story.guests for span in guest.spans)]:
            assert (look_of(name) is KERNEL_LOOK) == name.endswith("kernel"), name


WAYS = (
    ("check", "stop first", "save"),
    ("check", "save", "shutdown", "kexec + kernel", "userspace", "devices", "load", "resume"),
    ("save", "saved", "devices", "load", "resume"),
)


EVIL = '<script>alert("1")</script>&\x1b[31m\x00"\'{{ 7 * 7 }}'


def evil() -> Story:
    story = told(2, held=("web2",))
    guests = tuple(replace(guest, vm=EVIL, why=EVIL, evidence=((EVIL, EVIL, EVIL),)) for guest in story.guests)
    costs = (Cost(what=EVIL, part=Part.BOOT, begin=T0, end=T0 + 3, waiter=EVIL, needed_by=EVIL),)
    return replace(
        story, costs=costs, host=EVIL, kernel_after=EVIL, reason=EVIL, failures=(EVIL,), guests=guests, policy=EVIL
    )


def test_what_comes_from_outside_is_escaped() -> None:
    svg = render(evil(), "svg")
    assert "<script" not in svg
    assert "\x00" not in svg and "\x1b" not in svg
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    assert any("alert" in (text.text or "") for text in root.iter(f"{SVG}text"))
    page = render(evil(), "html")
    assert "<script" not in page.lower()
    assert "\x00" not in page
    assert "{{ 7 * 7 }}" in page


class Tags(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("story", [told(3), told(64, held=("web9",)), evil()], ids=["3", "64", "evil"])
def test_the_page_is_well_formed_and_stands_alone(story: Story) -> None:
    page = render(story, "html")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    loads = [
        (tag, name) for tag, attrs in tags.seen for name in attrs if name in ("src", "href", "srcset", "data", "action")
    ]
    assert loads == []
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in page


def test_json_has_everything() -> None:
    data = json.loads(render(told(2, held=("web2",)), "json"))
    assert data["verdict"]["tone"] == "bad"
    assert data["guests"][0]["about"]["qemu_after"] == "10.0.13"
    assert data["guests"][1]["evidence"][0][0] == "witness of 4096 pages"
    assert {"name", "begin", "end"} == set(data["phases"][0])


def with_costs(guests: int = 3) -> Story:
    """As the journal has them."""
    costs = [
        Cost(
            what="gitlab.service", part=Part.SHUTDOWN, begin=T0 + 2.1, end=T0 + 6.1, stops_first=True, waiter="db.service"
        ),
        Cost(what="db.service", part=Part.SHUTDOWN, begin=T0 + 6.2, end=T0 + 6.7),
        Cost(what=PURGATORY, part=Part.KERNEL, begin=T0 + 6.8, end=T0 + 9.0, size_bytes=80 << 20),
        Cost(what=KERNEL, part=Part.KERNEL, begin=T0 + 9.0, end=T0 + 12.0),
        Cost(what=INITRD, part=Part.KERNEL, begin=T0 + 12.0, end=T0 + 16.4, size_bytes=61 << 20),
        *(Cost(what=f"{n}.service", part=Part.BOOT, begin=T0 + n, end=T0 + n + 0.5) for n in (17, 18, 19)),
    ]
    records, timelines = upgrade(guests)
    last = records[-1]["at"] + 0.1
    record = {"event": COSTS, "upgrade": UPGRADE, "at": last, "costs": msgspec.to_builtins(costs)}
    return story_of("", [*records, record], timelines, "kvm7")


def test_who_cost_the_pause_is_told_in_each_form() -> None:
    story = with_costs()
    assert [cost.what for cost in story.costs][:2] == ["gitlab.service", "db.service"]
    assert story.outcome == "done"
    assert story.ended_at == with_costs().ended_at == told(3).ended_at, "a record after the end is no part of it"
    data = json.loads(render(story, "json"))
    assert data["costs"][0]["what"] == "gitlab.service"
    assert data["blame"][0]["what"] == "the initrd (61 MiB) took 4.40 s"
    assert data["blame"][1]["remedy"] == "put it into stop-first in [upgrade] of agent.toml"
    page = render(story, "html")
    assert "gitlab.service took 4.00 s to stop: put it into stop-first in [upgrade] of agent.toml." in page
    drawn = ["".join(text.itertext()) for text in ElementTree.fromstring(render(story, "svg")).iter(f"{SVG}text")]  # noqa: S314 - our own
    assert "gitlab.servicegitlab.service" in drawn, "its name, and what a pointer shows"
    assert "19.service19.service" not in drawn, "the longest alone are drawn"


def test_costs_are_drawn_below_the_guests_and_within_the_picture() -> None:
    picture = draw(with_costs(5))
    assert [row.full_name for row in picture.rows][:5] == [f"web{n}" for n in range(1, 6)]
    assert [row.full_name for row in picture.rows][5:7] == ["gitlab.service", "db.service"]
    assert len(picture.rows) == 5 + 6
    for row in picture.rows:
        assert picture.top <= row.y < row.y + row.height <= picture.bottom
        assert all(picture.left <= box.x and box.x + box.width <= picture.right + 1 for box in row.boxes)


@pytest.mark.parametrize("record", [{}, {"costs": 5}, {"costs": [{"what": 1}]}, {"costs": [{"part": "space"}]}])
def test_costs_of_a_newer_agent_are_left_out(record: dict[str, Any]) -> None:
    records, timelines = upgrade(1)
    foreign = {"event": COSTS, "upgrade": UPGRADE, "at": T0 + 29, **record}
    assert story_of("", [*records, foreign], timelines, "host").costs == ()


def test_units_that_stopped_first_are_a_phase_in_which_guests_run() -> None:
    records, timelines = upgrade(2)
    stopping = {"event": "upgrade-stopping", "upgrade": UPGRADE, "at": T0 - 2.0, "stopped_first": ["gitlab.service"]}
    story = story_of("", [records[0], stopping, *records[1:]], timelines, "host")
    assert names(story)[:3] == ["check", "stop first", "save"]
    assert without_overlap(story.phases)
    assert story.phases[1].end == pytest.approx(T0 - 0.1)
    assert story.longest and story.longest.pause_s == told(2).longest.pause_s  # type: ignore[union-attr]


def test_units_that_did_not_stop_are_told_without_a_guest() -> None:
    checking = upgrade(2)[0][0]
    story = story_of(
        "",
        [
            checking,
            {"event": "upgrade-stopping", "upgrade": UPGRADE, "at": T0, "stopped_first": ["gitlab.service"]},
            {"event": "upgrade-rolling-back", "upgrade": UPGRADE, "at": T0 + 5, "reason": "gitlab.service did not stop"},
            {"event": "upgrade-rolled-back", "upgrade": UPGRADE, "at": T0 + 6, "not_started": ["x: failed"]},
        ],
        [],
        "host",
    )
    assert names(story) == ["check", "stop first", "take back"]
    assert story.guests == ()
    page = render(story, "html")
    assert "gitlab.service did not stop" in page
    assert "x: failed" in page


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no format 'pdf'"):
        render(told(1), "pdf")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-0.1, "0 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.97, "1 min 00 s"),
        (72.4, "1 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (86399, "1 d 00 h"),
        (273600, "3 d 04 h"),
    ],
)
def test_lengths_are_written_as_people_read_them(seconds: float, words: str) -> None:
    assert length(seconds) == words


def test_sizes_are_written_as_people_read_them() -> None:
    assert [size(n) for n in (0, 290_000, 64 << 20, 3 << 29, 1020 << 10)] == [
        "0 B",
        "283 KiB",
        "64 MiB",
        "1.5 GiB",
        "1020 KiB",
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 1023, 1024, 1 << 20, 3 << 29, (3 << 29) + 1, 5 << 40])
def test_a_size_can_be_written_so_that_a_definition_reads_every_byte_of_it(count: int) -> None:
    assert Bytes.parse(exact_size(count)) == count


def test_the_timeline_of_a_guest_adds_up() -> None:
    timeline = GuestTimeline(**{**msgspec.to_builtins(upgrade(1)[1][0]), "shutdown_at": 0.0})
    assert sum(length_s for _, length_s in timeline.phases()) == pytest.approx(timeline.pause_s)
    assert "shutdown + kexec + kernel" in dict(timeline.phases())

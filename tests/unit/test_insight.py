# SPDX-License-Identifier: GPL-2.0-or-later
"""Journal entries and their catalog, metrics, the message of the day."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text_format

from cpr_agent.core.events import Event, about
from cpr_agent.core.model import VmState
from cpr_agent.core.upgrade.ledger import Kind, Phase, Upgrade
from cpr_agent.errors import InvalidArgument
from cpr_agent.host.journald import LEVELS, MESSAGE_IDS, LogControl, entry
from cpr_agent.report.metrics import Numbers, openmetrics
from cpr_agent.report.motd import line

ROOT = Path(__file__).parent.parent.parent
CATALOG = (ROOT / "units/cpr-agent.catalog").read_text()


def catalog_entries() -> dict[str, str]:
    ids = re.split(r"^-- ([0-9a-f]{32})$", CATALOG, flags=re.MULTILINE)[1:]
    return dict(zip(ids[::2], ids[1::2], strict=True))


def test_each_message_id_has_an_entry_in_the_catalog_and_the_reverse() -> None:
    assert set(MESSAGE_IDS) == set(Event)
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)
    assert sorted(catalog_entries()) == sorted(MESSAGE_IDS.values())
    for text in catalog_entries().values():
        assert re.match(r"\nSubject: .+\nDefined-By: cpr-agent\nDocumentation: man:", text)


def test_each_event_is_told_somewhere() -> None:
    sources = [path for path in ROOT.glob("agent/cpr_agent/core/**/*.py") if path.name != "events.py"]
    code = "".join(path.read_text() for path in sources)
    assert {event for event in Event if f"Event.{event.name}" in code} == set(Event)


def test_each_message_id_is_in_the_document() -> None:
    table = (ROOT / "docs/insight.md").read_text()
    for event, message_id in MESSAGE_IDS.items():
        assert f"| {event} | `{message_id}` |" in table


def test_the_fields_that_the_catalog_shows_are_sent() -> None:
    shown = set(re.findall(r"@(CPR_\w+)@", CATALOG))
    code = "".join(path.read_text() for path in ROOT.glob("agent/cpr_agent/core/**/*.py"))
    for field in shown:
        name = field.removeprefix("CPR_").lower()
        assert re.search(rf'\b{name}=|"{name}":', code), field


def test_the_catalog_is_one_that_journalctl_reads(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/systemd/catalog").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/catalog/cpr-agent.catalog").write_text(CATALOG)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    journalctl = ["journalctl", f"--root={tmp_path}"]
    subprocess.run([*journalctl, "--update-catalog"], check=True, capture_output=True)
    listed = subprocess.run([*journalctl, "--list-catalog"], check=True, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == len(MESSAGE_IDS)


def record(**fields: object) -> logging.LogRecord:
    logger = logging.getLogger("cpr_agent.test")
    extra = about(Event.SAVED, **fields)
    return logger.makeRecord(logger.name, logging.WARNING, "/x/y.py", 7, "it is %s", ("so",), None, "f", extra)


def test_an_entry_has_its_message_id_and_fields() -> None:
    fields = entry(record(vm="web1", upgrade="", phase="save"), "it is so")
    assert fields["MESSAGE_ID"] == MESSAGE_IDS[Event.SAVED]
    assert (fields["CPR_VM"], fields["CPR_PHASE"], fields["PRIORITY"]) == ("web1", "save", "4")
    assert "CPR_UPGRADE" not in fields
    assert (fields["CODE_FILE"], fields["CODE_LINE"], fields["SYSLOG_IDENTIFIER"]) == ("/x/y.py", "7", "cpr-agentd")


def test_an_entry_of_no_event_has_no_message_id() -> None:
    plain = logging.getLogger("x").makeRecord("x", logging.INFO, "/x", 1, "text", (), None)
    assert "MESSAGE_ID" not in entry(plain, "text")


def test_what_journald_would_cut_off_is_not_sent() -> None:
    assert entry(record(why="a\0b"), "x\0y")["MESSAGE"] == "x\N{REPLACEMENT CHARACTER}y"
    assert entry(record(why="a\0b"), "")["CPR_WHY"] == "a\N{REPLACEMENT CHARACTER}b"


def test_the_level_of_the_log_is_set_by_the_words_of_syslog() -> None:
    logger = logging.Logger("test")
    logs = LogControl(logger)
    assert (logs.level, logger.level) == ("info", logging.INFO)
    for word, level in LEVELS.items():
        logs.set_level(word)
        assert (logs.level, logger.level) == (word, level)
    with pytest.raises(InvalidArgument, match="no log level 'loud'"):
        logs.set_level("loud")
    with pytest.raises(InvalidArgument, match="can't log to 'kmsg'"):
        logs.set_target("kmsg")
    logs.set_target("console")
    assert isinstance(logger.handlers[0], logging.StreamHandler)
    assert len(logger.handlers) == 1


NUMBERS = Numbers(
    version="0.1.0",
    kernel='6.12 "odd\\name"\n',
    states={"web1": "running", "web2": "held", "db": "saved"},
    known_states=tuple(map(str, VmState)),
    pauses={"web1": 25.25},
    checkpoints={"db": 290_000, "web2": 290_001},
    held=frozenset({"web2"}),
    kind="upgrade",
    outcome="held",
    changed_at=1_790_000_000.5,
)


def test_metrics_are_openmetrics_and_the_older_format_too() -> None:
    text = openmetrics(NUMBERS)
    assert text.endswith("# EOF\n")
    new = {family.name: family for family in read_openmetrics(text)}
    old = {family.name: family for family in read_text_format(text)}
    assert set(new) == set(old)
    for name, family in new.items():
        assert family.type == old[name].type == "gauge"
        assert family.documentation
        assert [(s.name, s.labels, s.value) for s in family.samples] == [
            (s.name, s.labels, s.value) for s in old[name].samples
        ]
    assert (new["cpr_guest_pause_seconds"].unit, new["cpr_checkpoint_bytes"].unit) == ("seconds", "bytes")
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in new.values() for s in family.samples}
    assert samples["cpr_guests", "running"] == 1
    assert samples["cpr_guests", "stopped"] == 0
    assert samples["cpr_guest_held", "web2"] == 1
    assert samples["cpr_guest_held", "web1"] == 0
    assert samples["cpr_guest_pause_seconds", "web1"] == 25.25
    assert samples["cpr_checkpoint_bytes", "db"] == 290_000
    assert samples["cpr_last_upgrade_result", "held", "upgrade"] == 1
    assert samples["cpr_last_upgrade_result", "done", "upgrade"] == 0
    assert samples["cpr_last_upgrade_timestamp_seconds", "upgrade"] == 1_790_000_000.5
    assert samples["cpr_agent_info", "0.1.0", '6.12 "odd\\name"\n'] == 1


def test_a_host_without_guests_and_upgrades_has_metrics_too() -> None:
    text = openmetrics(replace(NUMBERS, states={}, pauses={}, checkpoints={}, kind=""))
    assert "cpr_last_upgrade" not in text
    assert list(read_openmetrics(text))


def test_the_message_of_the_day_is_one_line() -> None:
    def told(phase: str, *held: str) -> str:
        last = Upgrade(
            id="",
            kind=Kind.UPGRADE,
            phase=Phase(phase),
            boot="",
            started_at=0.0,
            changed_at=1_790_000_000.0,
            kernel_from="6.12.43",
            loaded=("web1", "web2", "web3"),
            longest_pause_s=25.31,
        )
        return line(last, "6.12.57", held)

    assert re.fullmatch(
        r"cpr-agent: upgrade 6.12.43 -> 6.12.57, 2026-09-\d\d [\d:]+ [+-]\d{4}: done, 3 guests went on, "
        r"longest pause 25.3 s.\n",
        told("done"),
    )
    said = told("held", "web1", "web2")
    assert said.count("\n") == 1
    assert "Held, and waiting for you: web1, web2 (cprctl status VM)." in said
    assert "all was taken back" in told("rolled-back")
    assert told("refused") == told("saving") == line(None, "6.12.57", ()) == ""
    assert line(None, "6.12.57", ("web1",)) == "cpr-agent: Held, and waiting for you: web1 (cprctl status VM).\n"
    assert "and 3 more" in told("held", *(f"web{number}" for number in range(8)))
    assert "\x1b" not in told("held", "\x1b[2J")

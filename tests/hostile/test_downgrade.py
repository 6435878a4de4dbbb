# SPDX-License-Identifier: GPL-2.0-or-later
"""Records that no agent of this version wrote, with right checksums: a newer agent's, after a downgrade."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cpr_agent.store.journal import _line
from tests.hostile.conftest import assert_contained
from tests.lab import Guest, Lab

HEAD = {"n": 100_000, "at": 1.0, "boot": "b"}
UPGRADE = {**HEAD, "event": "upgrade-checking", "upgrade": "u", "kind": "upgrade", "kernel_from": "6"}
RECORDS: dict[str, Any] = {
    "an event that is unknown": {**HEAD, "event": "teleported", "vm": "good", "to": {"mars": [1, 2]}},
    "no event": HEAD,
    "an event that is no text": {**HEAD, "event": ["x"], "vm": {"a": 1}},
    "a save with a run state that is unknown": {**HEAD, "event": "save-begin", "vm": "good", "run_state": "frozen"},
    "a save of nothing": {**HEAD, "event": "save-begin", "vm": "good"},
    "a save with fields of other types": {**HEAD, "event": "save-begin", "vm": "good", "checkpoint": 5, "path": []},
    "a transfer without a checkpoint": {**HEAD, "event": "transfer", "vm": "good"},
    "a phase that is unknown": {**UPGRADE, "event": "upgrade-teleporting"},
    "a kind that is unknown": {**UPGRADE, "kind": "sidegrade"},
    "an upgrade that is none": {**UPGRADE, "upgrade": {"id": 1}},
    "an upgrade under way that this agent does not know": {**UPGRADE, "event": "upgrade-saving", "shut_down": "x"},
    "an upgrade that was committed": {**UPGRADE, "event": "upgrade-committing"},
    "an upgrade that rolls back": {**UPGRADE, "event": "upgrade-rolling-back"},
    "a number beyond all": {**HEAD, "n": 1 << 80, "event": "saved", "vm": "good"},
    "a time that is none": {**HEAD, "at": "yesterday", "event": "resumed", "vm": "good", "checkpoint": "x"},
    "a compaction of a newer kind": {**HEAD, "event": "compacted", "vm": "good", "spent": [[1], {}], "more": True},
    "a VM with a name of nobody": {**HEAD, "event": "saved", "vm": "../../x", "checkpoint": "y"},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_of_a_newer_agent_stops_no_start(lab: Lab, good: Guest, record: dict[str, Any]) -> None:
    good.save()
    good.load()
    lab.end_agent()
    with (lab.state / "journal").open("ab") as journal:
        journal.write(_line(json.dumps(record).encode()))
    for _ in range(2):
        lab.start_agent()
        assert good.state == "running"
        lab.client(lambda client: client.manager("Check", "a{sv}", {}))
        lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))
        assert lab.end_agent() == 0
    lab.start_agent()
    assert_contained(lab, good)


@pytest.mark.parametrize("what", ["manifest.json", "held", "launched", "history"])
@pytest.mark.parametrize("text", ['{"a": {"b": [1]}}', "[]", "\x00\xff", "9" * 400, '{"sha256": 5, "manifest": []}', ""])
def test_a_file_of_a_newer_agent_stops_no_start(lab: Lab, good: Guest, what: str, text: str) -> None:
    other = lab.running("other")
    other.save()
    lab.end_agent()
    path = {"launched": lab.run / "launched/other.json", "history": lab.state / "history/x.json"}.get(
        what, other.checkpoint / what
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="latin-1")
    lab.start_agent()
    assert good.state == "running"
    assert other.state != "running"
    lab.client(lambda client: client.manager("Check", "a{sv}", {}))
    lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))
    good.save()
    good.load()
    assert_contained(lab, good)

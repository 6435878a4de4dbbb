# SPDX-License-Identifier: GPL-2.0-or-later
"""What people see of cprctl on a terminal that is narrow."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from cpr_agent.cli import screen, tables, timeline
from cpr_agent.report.render import render
from tests.stories import told

M = 1 << 20
UUID = "21dfda89-0355-4462-b7ed-7d7a01837540"
DEVICES = [
    {
        "node": "/dev/dax0.0",
        "uuid": UUID,
        "align": 2 * M,
        "mode": "devdax",
        "numa-node": -1,
        "provider": "ACPI.NFIT",
        "size": 1018 * M,
    }
    | {"used": [[64 * M, 512 * M, "customer-database-17"], [0, 64 * M, "web1"]], "free": [[576 * M, 442 * M]]},
    {
        "node": "/dev/dax10.0",
        "uuid": UUID[::-1],
        "align": 2 * M,
        "mode": "devdax",
        "numa-node": 1,
        "provider": "e820",
        "size": 1022 * M,
    }
    | {"used": [], "free": [[0, 1022 * M]]},
]


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, no colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_devices_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    narrow(monkeypatch)
    tables.devices(DEVICES)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["NODE", "UUID", "OFFSET", "SIZE", "VM"]
    assert lines[2] == ["/dev/dax0.0", UUID, "0", "64M", "web1"]
    assert lines[3] == ["ACPI.NFIT,", "aligned", "to", "2M", "64M", "512M", "customer-data"]
    assert lines[4:6] == [["base-17"], ["576M", "442M", "free"]]
    assert lines[7] == ["/dev/dax10.0", UUID[::-1], "0", "1022M", "free"]
    assert lines[8] == ["e820,", "NUMA", "node", "1,", "aligned", "to", "2M", "total", "1022M", "1022M", "free"]


def test_a_line_of_the_legend_does_not_end_within_a_phase(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow(monkeypatch)
    timeline.show(json.loads(render(told(2), "json")))
    legend = capsys.readouterr().out.splitlines()[-3:]
    assert [[" ".join(words.split()[:2]) for words in line.split("   ") if words.strip()] for line in legend] == [
        ["c check", "s save", "d shutdown"],
        ["k kexec", "u userspace", "v devices"],
        ["l load", "r resume"],
    ]


MARKUP = "[red]x[/] [/nonsense] :skull: [link=http://x]y[/link]"


def test_words_of_a_guest_or_a_file_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would style, link or leave out what is in brackets, and fail where it does not match."""
    memory: dict[str, Any] = {"size": M, "device": MARKUP, "offset": 0}
    vm: dict[str, Any] = dict.fromkeys(
        ("RunState", "Description", "Owner", "Qemu", "Unit", "User", "AdminSocket", "Problem"), MARKUP
    )
    vm |= {"Name": "web1", "State": "held", "MainPID": 1, "Memory": memory, "BlockedReasons": [MARKUP], "Checkpoint": {}}
    vm |= {"Held": {"at": 1.0, "error": MARKUP, "reason": MARKUP, "evidence": [[MARKUP, MARKUP, MARKUP]]}}
    vm |= {"Since": 0.0, "Cpus": 0, "LastPause": 0.0, "DefinitionState": "ok", "QemuRunning": MARKUP}
    vm |= {"QemuOutdated": True, "QemuInstalled": MARKUP}
    upgrade: dict[str, Any] = dict.fromkeys(("kind", "phase", "reason", "kernel-from", "kernel-to"), MARKUP)
    upgrade |= {"started-at": 1.0, "loaded": [], "cold-started": [MARKUP], "failures": [MARKUP]}
    job = {"Id": 1, "Kind": "save-all", "Progress": 0.5, "Step": MARKUP}
    tables.vm(vm)
    tables.agent({"Version": "1", "Kernel": "6", "Kernels": [], "Jobs": [job], "VMs": [vm], "LastUpgrade": upgrade})
    tables.findings([{"vm": "web1", "severity": "error", "what": MARKUP, "why": MARKUP, "remedy": MARKUP}])
    tables.memory(memory)
    out = capsys.readouterr().out
    assert out.count(MARKUP) == 33
    assert "\x1b]8" not in out


def test_a_job_is_shown_without_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with screen.screen() as shown:
        shown.step(MARKUP, 0.5)
    assert MARKUP in capsys.readouterr().err

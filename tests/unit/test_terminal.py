# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl's words on terminals of any width, where no agent is needed. tests/bus/test_cprctl.py has the rest."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from typing import Any

import pytest

from cpr_agent.bus.client import JobEnd
from cpr_agent.cli import jobs, screen, tables, terminal
from cpr_agent.cli.main import HABITS, SECTIONS, cli
from cpr_agent.cli.session import Output
from cpr_agent.words import advice, sentence

G = 1 << 30


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


def vm(name: str, **facts: Any) -> dict[str, Any]:
    memory = {"kind": "devdax", "device": f"uuid:{'21dfda89' * 4}", "size": 4 * G, "offset": 0, "survives": "kexec"}
    texts = dict.fromkeys(("Description", "RunState", "Unit", "User", "Qemu", "AdminSocket", "Problem"), "")
    known = {"Name": name, "State": "running", "MainPID": 4711, "Memory": memory, "Owner": "agent", "Checkpoint": {}}
    known |= {"BlockedReasons": [], "Held": {}, "Since": time.time(), "Cpus": 2, "Autostart": True, "LastPause": 12.3}
    known |= {"DefinitionState": "ok", "QemuOutdated": False, "QemuInstalled": "10.0.2 (Debian)"}
    return {**texts, **known, "QemuRunning": "10.0.2 (Debian)", **facts}


HELD = {"reason": "VM db: the contents of its memory are not what they were.", "error": "MemoryChanged", "at": 1.0}
VMS = [
    vm("web1"),
    vm("customer-database-17-with-a-long-name", Description="words " * 40),
    vm("db", State="held", Held={**HELD, "evidence": []}, Problem=HELD["reason"]),
    vm("broken", State="stopped", DefinitionState="invalid", Problem='/etc/cpr-agent/vms/broken.toml: unknown key "x"'),
    vm("old", DefinitionState="gone", QemuOutdated=True),
    vm("gpu", BlockedReasons=["it has a device of the host, and no guest agent to put it to sleep"]),
    vm("mute", State="unreachable", Problem="VM mute: QEMU has not answered within 5 s.", QemuRunning=""),
]


@pytest.mark.parametrize("columns", [40, 60, 80, 110, 120, 160])
def test_a_list_fits_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    on_terminal(monkeypatch, columns)
    tables.vms(VMS)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= columns
    assert len(lines) == 2 + len(VMS), "a row each"
    heads = lines[0].split()
    assert heads[:2] == ["VM", "STATE"]
    assert ("SINCE" in heads) == (columns >= 80)
    assert ("QEMU" in heads) == ("PAUSE" in heads) == (columns >= 110)
    assert ("DEVICE" in heads) == (columns >= 140)
    rows = dict(zip((one["Name"] for one in VMS), lines[2:], strict=True))
    words = {
        "db": "MemoryChanged",
        "broken": "bad definition",
        "old": "no definition",
        "gpu": "save blocked",
        "mute": "no answer",
    }
    if columns >= 110:
        words = {
            "db": "held: the",
            "broken": "bad definition: ",
            "old": "its definition",
            "gpu": "can't be",
            "mute": "QEMU has",
        }
    for name, said in words.items():
        assert said in rows[name], rows[name]
    name = rows["customer-database-17-with-a-long-name"].split()[0]
    assert name.count("…") == (len(name) < 37)
    assert len(name) >= {40: 11, 60: 25, 80: 20}.get(columns, 22)


def test_a_list_of_what_is_well_shows_devices_in_their_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch, 120)
    tables.vms([vm("web1", Description="front end")])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["VM", "STATE", "SINCE", "MEMORY", "SURVIVES", "DEVICE", "PAUSE", "QEMU", "DESCRIPTION"]
    assert row.split()[5] == "uuid:21dfda892…fda8921dfda89"
    assert row.rstrip().endswith("front end")


def test_a_pipe_gets_all_of_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    tables.vms(VMS)
    out = capsys.readouterr().out
    assert "…" not in out
    assert "words " * 40 in out
    assert len(out.splitlines()) == 2 + len(VMS)


def test_texts_break_between_words_and_hang_below_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "its RAM is in /dev/shm/a-name-that-is-longer-than-the-line, which a kexec erases for good"
    assert terminal.wrapped(text, "    why: ") == f"    why: {text}", "a pipe gets whole lines"
    on_terminal(monkeypatch, 40)
    lines = terminal.wrapped(text, "    why: ").splitlines()
    assert lines[0] == "    why: its RAM is in"
    assert all(line.startswith(" " * 9) and line[9] != " " for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"why: {text}"
    assert all(len(line) <= 40 for line in lines if "/dev/shm" not in line)


def test_no_prefix_twice_and_no_path_of_the_bus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch, 200)
    about = {"Version": "1", "Kernel": "6", "Kernels": [], "Jobs": [], "VMs": VMS, "LastUpgrade": {}}
    tables.agent(about)
    tables.vm(VMS[2])
    out = capsys.readouterr().out
    assert "VM db" not in out
    assert "VM mute" not in out
    assert "db: the contents of its memory" in out
    assert terminal.without_paths("there is no object /org/cpragent1/vm/web1.") == "there is no object."


def test_a_name_that_is_like_others_is_asked_about() -> None:
    assert terminal.nearest("wbe1", ["web1", "web2", "db"]) == "; did you mean web1?"
    assert terminal.nearest("web", ["web1", "web2", "db"]) == "; did you mean web2 or web1?"
    assert terminal.nearest("nope", ["web1"]) == ""


def test_a_job_ends_with_a_sentence() -> None:
    def guests(**steps: str) -> JobEnd:
        return JobEnd("done", {}, {name: {"step": step} for name, step in steps.items()})

    assert jobs._outcome(guests(a="saved", b="saved"), 0.312) == "2 guests saved in 312 ms"
    assert jobs._outcome(guests(a="loaded", b="started", c="loaded"), 2.0) == "2 guests loaded, 1 guest started in 2.00 s"
    assert jobs._outcome(guests(a="refreshed"), 0.05) == "1 guest in a new QEMU in 50 ms"
    assert jobs._outcome(guests(), 0.05) == "done in 50 ms"


def test_a_refusal_is_a_line_per_vm_and_one_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    left, remedy = "no guest was stopped", "mend the cause"
    guests = {
        name: {"step": "refused", "error": f"VM {name}: cannot be saved: its RAM is erased. The guest was not touched."}
        for name in ("web1", "db")
    }
    text = f"VM db: cannot be saved: its RAM is erased; VM web1: likewise. {left.capitalize()}. {remedy.capitalize()}."
    end = JobEnd(text, {"kind": "SaveRefused", "left": left, "remedy": remedy, "vm": "", "text": text, "what": ""}, guests)
    assert jobs.job_error(Output(), end) == 4
    assert capsys.readouterr().err.splitlines() == [
        "db: cannot be saved: its RAM is erased. The guest was not touched.",
        "web1: cannot be saved: its RAM is erased. The guest was not touched.",
        "cprctl: No guest was stopped. Mend the cause.",
    ]


def test_a_guest_that_is_on_its_way_already_has_its_own_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of who watches second; and the bar has a number."""
    monkeypatch.setenv("COLUMNS", "80")
    with screen.screen() as shown:
        shown.vm("web1", "saving")
        shown.step("saving web1, db", 0.25)
    err = capsys.readouterr().err
    assert "25%" in err
    row = next(line for line in err.splitlines() if line.startswith("web1"))
    assert float(row.split()[-2]) < 60, row


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("its RAM is in /dev/shm", "Its RAM is in /dev/shm."),
        ("is stopped and can't be saved", "It is stopped and can't be saved."),
        ("cannot be saved: it moves", "It cannot be saved: it moves."),
        ("VM db: its memory is lost.", "VM db: its memory is lost."),
        ("/etc/x.toml: unknown key", "/etc/x.toml: unknown key."),
        ("`cprctl drill` measures it", "`cprctl drill` measures it."),
        ("cpr-save.service is not enabled", "cpr-save.service is not enabled."),
        ("", ""),
    ],
)
def test_a_part_of_a_sentence_becomes_one(part: str, whole: str) -> None:
    assert sentence(part) == whole


@pytest.mark.parametrize(
    ("remedy", "whole"),
    [
        ("chmod o= /srv/a.img", "Run: chmod o= /srv/a.img"),
        (
            'user = "libvirt-qemu", then: systemctl restart libvirtd',
            'Set: user = "libvirt-qemu", then: systemctl restart libvirtd',
        ),
        ("mend the cause, or shut it down first", "Mend the cause, or shut it down first."),
        ("see `cprctl devices`", "See `cprctl devices`."),
        ("", ""),
    ],
)
def test_an_advice_has_no_full_stop_behind_a_command(remedy: str, whole: str) -> None:
    assert advice(remedy) == whole


def test_help_has_every_command_in_a_group_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = cprctl("--help").stdout
    assert cprctl("help").stdout == shown
    assert cprctl("help", "save").stdout == cprctl("save", "--help").stdout
    assert "..." not in shown.partition("\n")[2]
    assert max(map(len, shown.splitlines())) <= 80
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(set(cli.commands) - {"help"})
    assert "[default: kexec]" in cprctl("save", "--help").stdout


def test_words_of_other_programs_get_a_hint() -> None:
    assert not HABITS.keys() & cli.commands.keys()
    for word in ("destroy", "shutdown", "undefine", "reboot", "show", "info", "dumpxml", "console"):
        ended = cprctl(word, "web1")
        assert ended.returncode == 64
        assert HABITS[word] in ended.stderr
    assert "did you mean list?" in cprctl("lst").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "--html", "--svg"), "choose one of"),
        (("--json", "report", "--svg"), "choose one of"),
        (("save", "web1", "--before-kexec"), "--before-kexec is for --all"),
        (("save", "web1", "--all"), "name VMs, or give --all"),
        (("load", "web1", "db", "--file", "x"), "--file is for one VM"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: tuple[str, ...], said: str) -> None:
    ended = cprctl(*arguments)
    assert (ended.returncode, said in ended.stderr) == (64, True), ended


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_help_that_was_asked_for_is_printed_to_be_read(arguments: tuple[str, ...]) -> None:
    ended = cprctl(*arguments)
    assert (ended.returncode, "Usage: cprctl" in ended.stdout, ended.stderr) == (0, True, "")


def test_an_output_without_utf8_shows_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.fit_for_any_terminal()
    out.write("a…b")
    out.flush()
    assert out.buffer.getvalue() == b"a?b"


def cprctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cpr_agent.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

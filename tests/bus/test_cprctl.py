# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl as scripts see it: exit codes, JSON by its schema, errors, colours, lines of progress."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cpr_agent.bus.contract import read_contract
from cpr_agent.cli.main import SECTIONS, cli
from tests.kexec_lab import KexecLab
from tests.lab import PATIENCE_S, ROOT, Guest, Lab, script, until
from tests.terminal import Terminal

SCHEMA = json.loads((ROOT / "docs/schema/cprctl.schema.json").read_text())


def document(ended: subprocess.CompletedProcess[str], command: str) -> Any:
    """The one JSON document on stdout, which must be what the schema says of the command, or of a failure."""
    found = json.loads(ended.stdout)
    failed = isinstance(found, dict) and "error" in found
    part = {"$ref": "#/$defs/failed"} if failed else SCHEMA["properties"][command]
    Draft202012Validator({**part, "$defs": SCHEMA["$defs"]}).validate(found)
    return found


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    contract = read_contract()
    assert set(SCHEMA["$defs"]["vm"]["properties"]) == set(contract["org.cpragent1.VM"].properties)
    assert set(SCHEMA["$defs"]["job"]["properties"]) == set(contract["org.cpragent1.Job"].properties)
    commands = {name.partition(" ")[0] for name in SCHEMA["properties"]}
    assert commands == set(cli.commands) - {"help"}
    assert set(SCHEMA["properties"]["status"]["properties"]) == {*contract["org.cpragent1.Manager"].properties, "VMs"}


def test_all_that_is_printed_as_json_is_in_the_schema(lab: Lab) -> None:
    guest = lab.guest()
    (lab.definitions / "broken.toml").write_text("[vm]\nqemv = 1\n")
    seen = set()
    for command, code in (
        ("list", 0),
        ("reload", 1),
        ("start web1", 0),
        ("status", 0),
        ("status web1", 0),
        ("check", 4),
        ("check web1", 0),
        ("save web1", 4),
        ("save web1 --survives qemu-restart", 0),
        ("status web1", 0),
        ("load web1", 0),
        ("history", 0),
        ("report", 0),
        ("save --all --survives qemu-restart", 0),
        ("load --all", 0),
        ("refresh web1", 0),
        ("refresh --all", 0),
        ("save web1 --survives qemu-restart", 0),
        ("resume web1", 0),
        ("save web1 --survives qemu-restart", 0),
        ("stop web1", 0),
        ("discard web1 --yes", 0),
        ("start web1", 0),
        ("stop web1 --hard", 0),
        ("devices", 0),
        ("upgrade --dry-run", 4),
        ("drill", 4),
        ("rollback", 2),
        ("cancel 7", 3),
        ("memory allocate web1", 1),
        ("status none", 3),
        ("upgrade --kernel none", 4),
    ):
        ended = lab.cprctl(*command.split(), "--json")
        assert ended.returncode == code, (command, ended)
        words = command.split()
        names = (command, " ".join(words[:2]), words[0] + (" VM" if "web1" in words else ""), words[0])
        name = next(name for name in names if name in SCHEMA["properties"])
        found = document(ended, name)
        if "error" not in found:
            seen.add(name)
        else:
            assert found["error"]["message"] in ended.stderr.replace("cprctl: ", ""), command
    guest.call("Start")
    elsewhere = {"upgrade", "drill", "rollback", "cancel", "memory allocate", "edit", "import", "adopt", "release"}
    assert seen >= set(SCHEMA["properties"]) - elsewhere


def test_an_error_as_json_has_its_parts(lab: Lab) -> None:
    lab.guest("private", "-object", "memory-backend-ram,id=extra,size=16M").start()
    lab.guest("web1")
    for arguments, parts in (
        (("save", "private"), {"kind": "Blocked", "vm": "private"}),
        (("load", "web1"), {"kind": "NoCheckpoint", "vm": "web1"}),
        (("status", "none"), {"kind": "NoSuchVM", "vm": "none"}),
        (("save",), {"kind": "Usage", "vm": ""}),
        (("save", "--all"), {"kind": "SaveRefused"}),
        (("--bus-address", "unix:path=/nonexistent/bus", "list"), {"kind": "NoBus"}),
    ):
        error = document(lab.cprctl(*arguments, "--json"), "")["error"]
        assert parts.items() <= error.items(), error
    assert "choose another policy" in document(lab.cprctl("save", "--all", "--json"), "")["error"]["remedy"]
    assert document(lab.cprctl("--json", "cancel", "99"), "")["error"]["kind"] == "NoSuchJob"


def test_several_names_are_acted_on_one_after_the_other(lab: Lab) -> None:
    """Also behind one that fails, whose exit code it is; as JSON each has its place in a list."""
    for name in ("web1", "db"):
        lab.guest(name)
    ended = lab.cprctl("start", "web1", "wbe1", "db")
    assert ended.returncode == 3, ended
    assert ended.stdout == "web1: started\ndb: started\n"
    assert ended.stderr == "cprctl: no VM named wbe1; did you mean web1?\n"
    ended = lab.cprctl("--json", "stop", "web1", "wbe1", "db", "--hard")
    first, missing, last = document(ended, "stop")
    assert (first["State"], missing["error"]["kind"], last["State"]) == ("stopped", "NoSuchVM", "stopped")


def test_a_refused_save_of_all_is_a_line_per_vm_and_one_remedy(lab: Lab) -> None:
    for name in ("web1", "db"):
        lab.guest(name).start()
    lines = exits(lab, 4, "save", "--all").splitlines()
    assert [line.partition(":")[0] for line in lines[-3:]] == ["db", "web1", "cprctl"], lines
    assert all(line.count("does not survive a kexec") == 1 for line in lines[-3:-1])
    assert lines[-1] == ("cprctl: No guest was stopped. Mend the cause, shut the VM down first, or choose another policy.")
    one = exits(lab, 4, "save", "web1")
    assert "--survives qemu-restart" in one
    assert one.count("web1") == 2, "its name, and its memory's"


def test_nobody_is_asked_for_what_can_not_be(lab: Lab, tmp_path: Path) -> None:
    lab.guest("web1").start()
    terminal = on_terminal(lab, tmp_path, "discard web1")
    assert terminal.ended() == 3
    assert "no checkpoint" in terminal.shown
    assert "Go on?" not in terminal.shown
    lab.cprctl("save", "web1", "--survives", "qemu-restart")
    ended = lab.cprctl("stop", "web1")
    assert "its guest stays saved: cprctl load web1" in ended.stdout
    assert exits(lab, 3, "cancel", "99") == "cprctl: no job 99. See: cprctl status\n"


def test_history_is_a_row_a_load(lab: Lab) -> None:
    for name in ("web1", "db"):
        guest = lab.running(name)
        guest.save()
        guest.load()
    rows = lab.cprctl("history").stdout.splitlines()
    assert rows[0].split() == ["DATE", "VM", "PAUSE", "KERNEL", "REPORT", "PHASES"]
    assert [row.split()[2] for row in rows[2:]] == ["web1", "db"]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d ", rows[2])
    assert "save " in rows[2]
    assert [row.split()[2] for row in lab.cprctl("history", "-n", "1").stdout.splitlines()[2:]] == ["db"]
    assert [row.split()[2] for row in lab.cprctl("history", "web1").stdout.splitlines()[2:]] == ["web1"]
    lab.guest("fresh")
    assert exits(lab, 0, "history", "fresh") == "No load is on record.\n"
    assert exits(lab, 3, "history", "wbe1") == "cprctl: no VM named wbe1; did you mean web1?\n"


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_what_is_wrong_stands_in_a_list_that_fits(lab: Lab, tmp_path: Path, columns: str) -> None:
    """Of real VMs on terminals: no line is longer, and the first words of each row are whole."""
    for name in ("web1", "gone-but-running-1", "customer-database-long-one"):
        lab.guest(name).start()
    lab.guest("off")
    (lab.definitions / "gone-but-running-1.toml").unlink()
    (lab.definitions / "broken.toml").write_text("[vm]\nqemv = 1\n")
    lab.cprctl("reload")
    terminal = on_terminal(lab, tmp_path, "list", COLUMNS=columns)
    assert terminal.ended() == 0
    lines = [line.rstrip() for line in terminal.shown.splitlines() if "script" not in line.lower()]
    assert max(map(len, lines)) <= int(columns), lines
    rows = {line.split()[0]: line for line in lines if line.split()}
    assert "running" in rows["web1"]
    assert ("bad definition" if int(columns) < 100 else "bad definition: unknown key") in rows["broken"]
    assert any("no definition" in line or "definition is gone" in line for line in lines)
    assert ("QEMU" in lines[0]) == (int(columns) > 100)
    assert any("…" in line.split()[0] for line in lines if line.split()) == (int(columns) < 100)


def test_long_texts_wrap_at_words_with_a_hanging_indent(lab: Lab, tmp_path: Path) -> None:
    lab.guest("web1").start()
    terminal = on_terminal(lab, tmp_path, "check web1", COLUMNS="60")
    assert terminal.ended() == 0
    lines = [line.rstrip() for line in terminal.shown.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("    why: "))
    assert lines[at + 1].startswith(" " * len("    why: ")), lines
    shown = [line for line in lines if line and "Script" not in line]
    assert all(len(line) <= 60 or "/" in line for line in shown), "but for a path, which is no word to break"
    whole = [line for line in lab.cprctl("check", "web1").stdout.splitlines() if line.startswith("    why: ")]
    assert any(len(line) > 60 for line in whole), "a pipe gets whole lines"


@pytest.mark.parametrize("answer", ["n", "y"])
def test_an_upgrade_asks_on_a_terminal(lab: Lab, tmp_path: Path, answer: str) -> None:
    """Which host, into which kernel, with how many guests. A kexec that is called off takes everything back."""
    kexec = KexecLab(lab, 1)
    terminal = on_terminal(lab, tmp_path, "upgrade", COLUMNS="200")
    terminal.until_shows("[y/N]")
    assert re.search(rf"Restart {re.escape(os.uname().nodename)} into \S+ with 1 guest", terminal.shown), terminal.shown
    assert kexec.guests[0].state == "running"
    terminal.type(f"{answer}\n")
    if answer == "n":
        assert terminal.ended() == 1
        assert json.loads(lab.cprctl("status", "--json").stdout)["LastUpgrade"] == {}
    else:
        until(lambda: kexec.under_way, "the kexec begins")
        kexec.call_off()
        assert terminal.ended() != 0
        assert "the kexec did not happen" in " ".join(terminal.shown.split())
    kexec.guests[0].assert_unbroken()


def test_a_terminal_without_utf8_is_no_failure(lab: Lab, tmp_path: Path) -> None:
    lab.guest("a-customer-s-database-with-a-long-name")
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    terminal = on_terminal(lab, tmp_path, "list", **environment)
    assert terminal.ended() == 0, terminal.shown
    assert "a-custom?ng-name" in terminal.shown or "a-custom" in terminal.shown
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("destroy", "web1"), "`cprctl stop --hard VM`"),
        (("dumpxml", "web1"), "cprctl edit"),
        (("lst",), "did you mean list?"),
        (("report", "--html", "--svg"), "choose one of"),
        (("--json", "report", "--svg"), "choose one of"),
        (("save", "web1", "--before-kexec"), "--before-kexec is for --all"),
    ],
)
def test_wrong_usage_is_told_what_is_meant(arguments: tuple[str, ...], said: str, lab: Lab) -> None:
    assert said in exits(lab, 64, *arguments)


def test_help_has_every_command_in_a_group_and_cuts_nothing(lab: Lab) -> None:
    shown = exits(lab, 0, "--help")
    assert exits(lab, 0, "help") == shown
    assert exits(lab, 0, "help", "save") == exits(lab, 0, "save", "--help")
    assert "..." not in shown.partition("\n")[2]
    assert max(map(len, shown.splitlines())) <= 80
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(set(cli.commands) - {"help"})
    assert "[default: kexec]" in exits(lab, 0, "save", "--help")


def exits(lab: Lab, code: int, *arguments: str) -> str:
    ended = lab.cprctl(*arguments)
    assert ended.returncode == code, (arguments, ended)
    return ended.stdout + ended.stderr


def test_exit_codes_are_as_documented(lab: Lab) -> None:
    """Refusals by polkit, with 77, are test_polkit's."""
    assert exits(lab, 2, "save", "--all") == "cprctl: nothing to do: no VM has a live guest that is not saved yet.\n"
    assert "nothing was upgraded or loaded on this host yet" in exits(lab, 3, "report")
    assert "nothing to do: no VM has a checkpoint" in exits(lab, 2, "load", "--all")
    assert "nothing to do" in exits(lab, 2, "load", "--all", "--autostart")
    assert "nothing to do" in exits(lab, 2, "refresh", "--all")
    assert "nothing to do: there is no save that could be taken back" in exits(lab, 2, "rollback")
    lab.guest()
    lab.guest("web2")
    exits(lab, 0, "start", "web1")
    assert "already" in exits(lab, 1, "start", "web1")
    assert "no VM named none" in exits(lab, 3, "stop", "none")
    assert "has no checkpoint" in exits(lab, 3, "load", "web2")
    assert "is stopped, and has no QEMU that could be replaced" in exits(lab, 1, "refresh", "web2")
    assert "no adopted domain" in exits(lab, 1, "release", "web2", "--yes")
    assert "no editor can be used here" in exits(lab, 64, "edit", "web2")
    assert "a kexec" in exits(lab, 4, "save", "--all")
    assert "does not run under systemd" in exits(lab, 4, "upgrade")
    no_bus = exits(lab, 5, "--bus-address", "unix:path=/nonexistent/bus", "list")
    assert no_bus.startswith("cprctl: cannot connect to D-Bus: ")
    assert no_bus.endswith("See: systemctl status dbus.service\n")
    exits(lab, 64, "nonsense")
    exits(lab, 64, "save", "--survives", "doomsday", "web1")
    assert "1 guest saved in" in exits(lab, 0, "save", "--all", "--survives", "qemu-restart")
    assert "nothing to do" in exits(lab, 2, "save", "--all", "--survives", "qemu-restart")
    lab.end_agent()
    assert "the agent is not there" in exits(lab, 5, "list")


def test_a_pipe_gets_each_change_on_a_line_and_no_colour(lab: Lab) -> None:
    for name in ("web1", "web2"):
        lab.guest(name).start()
    ended = lab.cprctl("save", "--all", "--survives", "qemu-restart")
    lines = ended.stderr.splitlines()
    for name in ("web1", "web2"):
        assert lines.index(f"{name}: saving") < lines.index(f"{name}: saved"), lines
    assert len(lines) == len(set(lines))
    assert re.fullmatch(r"2 guests saved in [\d.]+ m?s\n", ended.stdout)
    assert "\x1b" not in ended.stderr + lab.cprctl("list").stdout


def test_a_pipe_gets_whole_lines(lab: Lab) -> None:
    guest = lab.guest()
    guest.definition["vm"]["description"] = words = "word " * 200 + "end"
    lab.define(guest)
    assert words in lab.cprctl("list").stdout.splitlines()[-1]


def test_a_reader_that_has_seen_enough_is_no_error(lab: Lab) -> None:
    lab.guest()
    with lab.cprctl_started("list") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.fixture
def slow(lab: Lab, tmp_path: Path) -> Iterator[Guest]:
    """Saved, and its next QEMU waits for a writer at the FIFO "gate"."""
    gate = tmp_path / "gate"
    waits = f'case "$*" in *-incoming*) [ ! -e {gate} ] || read line <{gate};; esac'
    guest = lab.guest(qemu=script(tmp_path / "qemu", f'#!/bin/sh\n{waits}\nexec {lab.qemu} "$@"\n'))
    guest.start()
    guest.until_counts()
    guest.save()
    os.mkfifo(gate)
    yield guest
    gate.unlink(missing_ok=True)


def on_terminal(lab: Lab, directory: Path, arguments: str, **environment: str) -> Terminal:
    command = f"{sys.executable} -c 'from cpr_agent.cli.main import main; main()' {arguments}"
    return Terminal(directory, command, CPR_AGENT_BUS_ADDRESS=lab.address, **environment)


def test_a_terminal_has_a_row_for_each_guest(lab: Lab, slow: Guest, tmp_path: Path) -> None:
    lab.guest("off")
    terminal = on_terminal(lab, tmp_path, "load --all")
    terminal.until_shows("loading web1")
    terminal.until_shows("web1  loading")
    (tmp_path / "gate").write_text("go\n")
    assert terminal.ended() == 0
    assert "web1  running" in terminal.shown
    assert "off" not in terminal.shown
    assert "\x1b[32m" in terminal.raw, "colours"
    assert terminal.raw.rfind("\x1b[?25h") > terminal.raw.rfind("\x1b[?25l") >= 0, "the cursor is back"
    slow.assert_unbroken()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_left_out_where_nobody_wants_them(
    lab: Lab, slow: Guest, tmp_path: Path, environment: dict[str, str]
) -> None:
    terminal = on_terminal(lab, tmp_path, "load --all", **environment)
    terminal.until_shows("loading web1")
    (tmp_path / "gate").write_text("go\n")
    assert terminal.ended() == 0
    assert not re.search(r"\x1b\[[0-9;]*[34]\d", terminal.raw), terminal.raw
    if "TERM" in environment:
        assert "\x1b" not in terminal.raw
        assert "web1: running" in terminal.raw
    slow.assert_unbroken()


def test_ctrl_c_leaves_the_job_to_the_agent(lab: Lab, slow: Guest, tmp_path: Path) -> None:
    terminal = on_terminal(lab, tmp_path, "load --all")
    terminal.until_shows("loading web1")
    terminal.type("\x03")
    terminal.until_shows("Cancel job 1?")
    assert terminal.raw.rfind("\x1b[?25h") > terminal.raw.rfind("\x1b[?25l"), "the cursor is back"
    terminal.type("n\n")
    assert terminal.ended() == 130
    assert "job 1 goes on" in terminal.shown
    assert "job 1: load-all" in lab.cprctl("status").stdout
    job = json.loads(lab.cprctl("status", "--json").stdout)["Jobs"][0]
    assert job["State"] == "running"
    (tmp_path / "gate").write_text("go\n")
    slow.until_state("running")
    slow.assert_unbroken()


def test_ctrl_c_and_yes_cancels_it(lab: Lab, slow: Guest, tmp_path: Path) -> None:
    terminal = on_terminal(lab, tmp_path, "load --all")
    terminal.until_shows("loading web1")
    terminal.type("\x03")
    terminal.until_shows("Cancel job 1?")
    terminal.type("y\n")
    assert terminal.ended() == 1, terminal.shown
    assert "cancelled" in terminal.shown
    assert slow.state == "saved"


def test_an_interrupt_in_a_pipe_leaves_the_job_alone_and_another_cprctl_cancels_it(lab: Lab, slow: Guest) -> None:
    cprctl = lab.cprctl_started("load", "--all", "--json")
    slow.until_state("loading")
    cprctl.send_signal(signal.SIGINT)
    stdout, stderr = cprctl.communicate(timeout=PATIENCE_S)
    assert cprctl.returncode == 130, stderr
    assert json.loads(stdout)["error"]["kind"] == "Interrupted"
    assert "`cprctl cancel 1` takes it back" in stderr
    ended = lab.cprctl("cancel", "1", "--json")
    assert (ended.returncode, document(ended, "cancel")) == (0, {"result": "done"})
    slow.until_state("saved")


def test_an_upgrade_as_json(lab: Lab) -> None:
    kexec = KexecLab(lab, 1)
    ended = lab.cprctl("upgrade", "--dry-run", "--json")
    assert ended.returncode == 0, ended
    assert document(ended, "upgrade")["result"] == "done"
    assert kexec.guests[0].state == "running"

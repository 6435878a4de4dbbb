# SPDX-License-Identifier: GPL-2.0-or-later
"""What an admin is told by the real agent, and what an admin's hooks tell it: reports, logs, metrics, motd."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from cpr_agent.bus.client import CallError
from tests.lab import PATIENCE_S, ROOT, Lab, refused, script, until


def test_a_load_is_reported_in_each_form(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    guest.load()
    until(lambda: json.loads(lab.cprctl("history", "--json").stdout), "the load is on record")
    told = json.loads(lab.cprctl("report", "--json").stdout)
    assert (told["kind"], told["outcome"], told["guests"][0]["vm"]) == ("load", "done", "web1")
    assert told["guests"][0]["about"]["qemu_after"] == told["guests"][0]["about"]["qemu_before"] != ""
    assert [phase["name"] for phase in told["phases"]] == ["save", "saved", "devices", "load", "resume"]
    svg = lab.cprctl("report", told["id"][:8], "--svg")
    assert svg.returncode == 0, svg
    assert "web1" in "".join(ElementTree.fromstring(svg.stdout).itertext())  # noqa: S314 - the agent's own
    assert lab.cprctl("report", "--html").stdout.startswith("<!DOCTYPE html>")
    said = lab.cprctl("report").stdout
    assert "1 of 1 guests went on" in said
    assert told["id"][:8] in said
    assert told["id"][:8] in lab.cprctl("history").stdout
    guest.assert_unbroken()


def test_all_that_was_saved_and_loaded_is_one_report(lab: Lab) -> None:
    for name in ("web1", "web2"):
        lab.running(name)
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    assert json.loads(lab.cprctl("report", "--json").stdout)["outcome"] == "saved"
    assert lab.job("LoadAll") == "done"
    told = json.loads(lab.cprctl("report", "--json").stdout)
    assert (told["kind"], told["outcome"]) == ("save-all", "done")
    outcomes = {guest["vm"]: guest["outcome"] for guest in told["guests"]}  # in the order in which they stopped
    assert outcomes == {"web1": "went on", "web2": "went on"}


def test_a_guest_that_is_held_is_in_the_report(lab: Lab) -> None:
    guest = lab.running()
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    guest.admin("quit")
    until(lambda: guest.pid == 0, "its QEMU has ended")
    with guest.ram.open("r+b") as ram:
        ram.write(bytes(16 << 20))
    assert "VM web1" in lab.job("LoadAll")
    told = json.loads(lab.cprctl("report", "--json").stdout)
    (held,) = told["guests"]
    assert (told["outcome"], held["outcome"]) == ("held", "held")
    assert held["why"]
    assert held["evidence"]


def test_a_report_that_is_not_there(lab: Lab) -> None:
    with pytest.raises(CallError, match="nothing was upgraded or loaded") as caught:
        lab.client(lambda client: client.manager("Report", "ss", "", "json"))
    assert caught.value.kind == "NoSuchReport"
    ended = lab.cprctl("report", "deadbeef")
    assert (ended.returncode, ended.stdout) == (3, "")
    guest = lab.running()
    guest.save()
    guest.load()
    until(lambda: lab.cprctl("report").returncode == 0, "the load is on record")
    ended = lab.cprctl("report", "deadbeef", "--html")
    assert ended.returncode == 3
    assert "there is no report 'deadbeef'" in ended.stderr
    with pytest.raises(CallError, match="no format 'pdf'"):
        lab.client(lambda client: client.manager("Report", "ss", "", "pdf"))
    assert lab.cprctl("report", "--svg", "--json").returncode == 64


# -- hooks --------------------------------------------------------------------------------------------------------------


def hook(lab: Lab, phase: str, name: str, text: str, mode: int = 0o755) -> Path:
    directory = lab.root / f"etc/cpr-agent/hooks.d/{phase}.d"
    directory.mkdir(parents=True, exist_ok=True)
    path = Path(script(directory / name, f"#!/bin/sh\n{text}\n"))
    path.chmod(mode)
    return path


def test_hooks_run_in_order_and_are_told_what_it_is_about(lab: Lab) -> None:
    log = lab.root / "hooks.log"
    guest = lab.running()
    for phase in ("check", "pre-save", "post-load"):
        for name in ("20-second", "10-first"):
            hook(lab, phase, name, f'echo "$CPR_PHASE {name} $CPR_VM $(cat)" >>{log}')
    hook(lab, "pre-save", "30-off", f"echo off >>{log}", mode=0o644)
    hook(lab, "pre-save", "40-left.dpkg-old", f"echo left >>{log}")
    guest.save()
    guest.load()
    lines = until(lambda: (found := log.read_text().splitlines()) and len(found) == 6 and found, "all hooks have run")
    assert [line.split(" {")[0] for line in lines] == [
        f"{phase} {name} web1" for phase in ("check", "pre-save", "post-load") for name in ("10-first", "20-second")
    ]
    told = [json.loads(line[line.index("{") :]) for line in lines]
    assert {one["run_state"] for one in told} == {"running"}
    assert told[0]["vm"] == "web1"
    assert told[-1]["pause_s"] > 0
    guest.assert_unbroken()


def test_the_example_of_a_hook_is_one(lab: Lab) -> None:
    guest = lab.running()
    path = hook(lab, "check", "10-backup", "")
    path.write_text((ROOT / "packaging/example-check-hook").read_text())
    guest.save()
    guest.load()
    tools = lab.root / "tools"
    tools.mkdir()
    script(tools / "systemctl", "#!/bin/sh\nexit 0\n")  # the backup runs
    path.write_text(path.read_text().replace("systemctl", str(tools / "systemctl")))
    refused(guest, "Blocked", "the backup is under way", member="CprSave")


def test_a_check_hook_vetoes_with_its_first_line(lab: Lab) -> None:
    guest = lab.running()
    hook(lab, "check", "10-backup", "echo 'the backup runs' >&2; echo more >&2; exit 3")
    text = refused(guest, "Blocked", "10-backup: the backup runs", member="CprSave")
    assert "more" not in text
    ended = lab.cprctl("check", "web1")
    assert ended.returncode == 4
    assert "the backup runs" in ended.stdout
    assert guest.state == "running"
    guest.assert_unbroken()


def test_a_hook_that_hangs_is_killed_with_its_children_and_counts_as_failed(lab: Lab) -> None:
    guest = lab.running()
    lab.end_agent()
    lab.settings(hooks={"timeout": "1s"})
    lab.start_agent()
    pids = lab.root / "pids"
    hook(lab, "pre-save", "10-hangs", f"sleep 1000 & echo $$ $! >{pids}; wait")
    refused(guest, "SaveFailed", "10-hangs: did not end within 1 s, and was killed", "not stopped", member="CprSave")
    programs = [Path(f"/proc/{pid}/exe") for pid in pids.read_text().split()]
    until(lambda: not any(program.exists() for program in programs), "the hook and its child are gone")
    guest.assert_unbroken()


@pytest.mark.parametrize("which", ["file", "directory", "parent"])
def test_a_hook_that_others_could_change_is_refused(lab: Lab, which: str) -> None:
    guest = lab.running()
    ran = lab.root / "ran"
    path = hook(lab, "pre-save", "10-open", f"touch {ran}")
    {"file": path, "directory": path.parent, "parent": path.parent.parent}[which].chmod(0o777)
    refused(guest, "SaveFailed", "was not run", "others may write to", "(mode 0777)", member="CprSave")
    assert not ran.exists()
    guest.assert_unbroken()


def test_a_hook_of_somebody_else_is_refused(lab: Lab) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file away needs root")
    guest = lab.running()
    path = hook(lab, "check", "10-theirs", "exit 0")
    os.chown(path, 65534, 65534)
    refused(guest, "Blocked", "belongs to user 65534", member="CprSave")
    path.unlink()
    path.symlink_to("/bin/true")
    refused(guest, "Blocked", "is a symbolic link", member="CprSave")


def test_a_hook_that_says_much_or_leaves_a_child_behind_keeps_nobody_waiting(lab: Lab) -> None:
    guest = lab.running()
    pid = lab.root / "pid"
    hook(lab, "check", "10-much", "yes | head -c 3000000 >&2; yes | head -c 300000")
    hook(lab, "check", "20-leaves", f"sleep 1000 & echo $! >{pid}; exit 0")
    begun = time.monotonic()
    guest.save()
    assert time.monotonic() - begun < PATIENCE_S / 2
    os.kill(int(pid.read_text()), 9)
    guest.load()
    guest.assert_unbroken()


def test_a_post_load_hook_that_fails_is_in_the_report_and_the_guest_runs(lab: Lab) -> None:
    guest = lab.running()
    hook(lab, "post-load", "10-announce", "echo 'the switch said no' >&2; exit 1")
    guest.save()
    guest.load()
    until(lambda: "the switch said no" in lab.cprctl("report").stdout, "it is in the report")
    assert guest.state == "running"
    guest.assert_unbroken()


# -- logs, metrics, motd ------------------------------------------------------------------------------------------------

LOGS = ("/org/freedesktop/LogControl1", "org.freedesktop.DBus.Properties")


def test_the_log_level_is_set_by_log_control(lab: Lab) -> None:
    def busctl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["busctl", f"--address={lab.address}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    control = ("org.cpragent1", LOGS[0], "org.freedesktop.LogControl1")
    assert busctl("get-property", *control, "LogLevel").stdout == 's "info"\n'
    assert busctl("get-property", *control, "LogTarget").stdout == 's "console"\n'
    assert busctl("get-property", *control, "SyslogIdentifier").stdout == 's "cpr-agentd"\n'
    assert busctl("set-property", *control, "LogLevel", "s", "debug").returncode == 0
    assert busctl("get-property", *control, "LogLevel").stdout == 's "debug"\n'
    for name, value, said in (
        ("LogLevel", "loud", "no log level"),
        ("LogTarget", "kmsg", "can't log to"),
        ("SyslogIdentifier", "x", "read-only"),
    ):
        ended = busctl("set-property", *control, name, "s", value)
        assert ended.returncode != 0
        assert said in ended.stderr
    assert "LogLevel" in busctl("introspect", *control[:2]).stdout
    guest = lab.running()
    assert "DEBUG" in lab.log.read_text()
    assert (
        LOGS[0]
        not in busctl(
            "call", "org.cpragent1", "/org/cpragent1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"
        ).stdout
    )
    guest.assert_unbroken()


def test_metrics_follow_what_happens(lab: Lab) -> None:
    lab.end_agent()
    directory = lab.root / "var/lib/prometheus/node-exporter"
    directory.mkdir(parents=True)
    lab.start_agent()
    guest = lab.running()

    def sample(wanted: str) -> bool:
        path = directory / "cpr-agent.prom"
        if not path.exists():
            return False
        list(text_string_to_metric_families(path.read_text()))  # each state of it is whole
        return wanted in path.read_text()

    until(lambda: sample('cpr_guests{state="running"} 1\n'), "the guest runs")
    assert (directory / "cpr-agent.prom").stat().st_mode & 0o777 == 0o644
    guest.save()
    until(lambda: sample('cpr_checkpoint_bytes{vm="web1"} '), "the guest is saved")
    guest.load()
    until(lambda: sample('cpr_guest_pause_seconds{vm="web1"} '), "the pause is on record")
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    assert lab.job("LoadAll") == "done"
    until(lambda: sample('cpr_last_upgrade_result{kind="save-all",result="done"} 1\n'), "the end is told")
    assert [path.name for path in directory.iterdir()] == ["cpr-agent.prom"]


def test_metrics_that_cannot_be_written_hurt_nobody(lab: Lab) -> None:
    lab.end_agent()
    lab.settings(report={"metrics": "/nowhere"})
    lab.start_agent()
    guest = lab.running()
    guest.save()
    guest.load()
    guest.assert_unbroken()
    until(lambda: "could not be written" in lab.log.read_text(), "it is told")
    lab.end_agent()
    lab.settings(report={"metrics": "here"})
    lab.start_agent(mortal=True)
    assert 'report.metrics is "here"' in lab.log.read_text()


def test_a_held_guest_is_in_the_message_of_the_day_until_it_is_not_held(lab: Lab) -> None:
    lab.end_agent()
    (lab.root / "run/motd.d").mkdir(parents=True)
    lab.start_agent()
    guest = lab.running()
    motd = lab.root / "run/motd.d/50-cpr-agent"
    guest.save()
    guest.admin("quit")
    until(lambda: guest.pid == 0, "its QEMU has ended")
    with guest.ram.open("r+b") as ram:
        ram.write(bytes(16 << 20))
    refused(guest, "MemoryChanged")
    until(motd.exists, "it is told")
    assert motd.read_text() == "cpr-agent: Held, and waiting for you: web1 (cprctl status VM).\n"
    guest.call("Discard")
    until(lambda: not motd.exists(), "nothing is left to tell")

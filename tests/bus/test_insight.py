"""What an admin is told afterwards, by the real agent: reports."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Lab, until


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
    assert [(guest["vm"], guest["outcome"]) for guest in told["guests"]] == [("web1", "went on"), ("web2", "went on")]


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
    assert lab.cprctl("report", "--svg", "--json").returncode == 2

# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of Cockpit in a real browser: over the real cockpit-ws and bridge, with a real agent and real QEMUs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.cockpit.conftest import Desk, button, row
from tests.kexec_lab import NEVER, KexecLab, kill_and_wait
from tests.lab import PATIENCE_S, ROOT, Lab, let_others_in, script, until

NOBODY = "65534"
HOST = socket.gethostname()
RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.cpragent1.inspect" && subject.user == "nobody")
        return polkit.Result.YES;
});
"""


def view(page: Page, *path: str) -> None:
    page.evaluate("path => { window.location.hash = cockpit.location.encode(path) }", list(path))


def test_the_overview_follows_what_happens(desk: Desk) -> None:
    first, second = desk.lab.running("web1"), desk.lab.running("web2")
    page = desk.session()
    expect(row(page, "web1")).to_contain_text("Running")
    expect(row(page, "web1")).to_contain_text("16 MiB")
    expect(row(page, "web1")).to_contain_text("A new QEMU, not a new kernel")
    expect(row(page, "web2")).to_contain_text("Running")
    desk.look(page, "overview")
    first.save()
    expect(row(page, "web1")).to_contain_text("Saved")
    first.load()
    expect(row(page, "web1")).to_contain_text("Running")
    expect(row(page, "web1")).to_contain_text(re.compile(r"\d\sm?s"))
    second.call("Stop", "s", "hard")
    expect(row(page, "web2")).to_contain_text(re.compile("Stopped|Shut down"))
    desk.lab.guest("web3")
    expect(row(page, "web3")).to_contain_text("Stopped")
    first.assert_unbroken()


def test_a_host_without_guests(desk: Desk) -> None:
    page = desk.session()
    expect(page.get_by_text("No guests yet")).to_be_visible()
    expect(page.get_by_text("Nothing on this host keeps memory over a kexec")).to_be_visible()
    desk.look(page, "no-guests")


def test_an_agent_that_restarts_and_one_that_does_not_run(desk: Desk) -> None:
    guest = desk.lab.running()
    page = desk.session()
    expect(row(page, "web1")).to_contain_text("Running")
    desk.lab.end_agent()
    gone = page.get_by_text(re.compile("The agent is (restarting|not running)")).first  # the latter on a slow day
    expect(gone).to_be_visible()
    desk.lab.start_agent()
    expect(gone).to_be_hidden()
    expect(row(page, "web1")).to_contain_text("Running")
    desk.lab.end_agent()
    expect(page.get_by_role("heading", name="The agent is not running")).to_be_visible()
    desk.look(page, "agent-not-running")
    button(page, "Start the agent").click()
    until((desk.lab.root / "asked-to-start").exists, "the page asks systemd for the agent")
    desk.lab.start_agent()
    expect(row(page, "web1")).to_contain_text("Running")
    guest.assert_unbroken()


def test_an_older_agent_is_shown_as_far_as_it_goes_and_upgraded_under_the_page(desk: Desk) -> None:
    guest = desk.lab.running()
    desk.lab.end_agent()
    command = [sys.executable, "-m", "tests.cockpit.older_agent", desk.lab.address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as older:
        assert older.stdout
        assert older.stdout.readline() == b"ready\n"
        page = desk.session()
        expect(page.get_by_text("The agent is of another version (0.0.9) than this page")).to_be_visible()
        expect(row(page, "web1")).to_contain_text("Running")
        page.get_by_role("link", name="web1", exact=True).click()
        expect(page.get_by_text("The history cannot be shown.")).to_be_visible()
        desk.look(page, "older-agent")
        older.terminate()
    desk.lab.start_agent()
    expect(page.get_by_text("The agent is of another version")).to_be_hidden()
    expect(page.get_by_text("It was never loaded.")).to_be_visible()
    guest.assert_unbroken()


def test_each_act_on_a_guest(desk: Desk) -> None:
    guest = desk.lab.guest("web1")
    page = desk.session()
    page.get_by_role("link", name="web1", exact=True).click()
    state = page.get_by_role("heading", level=1)
    expect(state).to_contain_text("Stopped")
    button(page, "Start").click()
    expect(state).to_contain_text("Running")
    guest.until_counts()
    desk.look(page, "vm-running")
    button(page, "Save").click()
    button(page.get_by_role("dialog"), "Save").click()
    expect(state).to_contain_text("Saved")
    expect(page.get_by_role("heading", name="Checkpoint")).to_be_visible()
    desk.look(page, "vm-saved")
    button(page, "Load").click()
    expect(state).to_contain_text("Running")
    expect(page.get_by_role("link", name="Report of")).to_have_count(1)
    guest.assert_unbroken()
    pid = guest.pid
    button(page, "New QEMU").click()
    button(page.get_by_role("dialog"), "New QEMU").click()
    until(lambda: guest.pid not in (0, pid), "it has another QEMU")
    guest.assert_unbroken()
    expect(button(page, "Save")).to_be_enabled()
    button(page, "Save").click()
    button(page.get_by_role("dialog"), "Save").click()
    expect(state).to_contain_text("Saved")
    button(page, "Resume").click()
    expect(state).to_contain_text("Running")
    guest.assert_unbroken()
    button(page, "Force off").click()
    desk.look(page, "vm-force-off")
    button(page.get_by_role("dialog"), "Cancel").click()
    guest.assert_unbroken()
    button(page, "Force off").click()
    button(page.get_by_role("dialog"), "Force off").click()
    expect(state).to_contain_text(re.compile("Stopped|Shut down"))


def test_a_refusal_is_shown_as_the_agent_says_it(desk: Desk) -> None:
    desk.lab.guest("web1", "-no-such-option")
    page = desk.session()
    view(page, "vm", "web1")
    button(page, "Start").click()
    expect(page.get_by_text("Start failed")).to_be_visible()
    expect(page.get_by_text("-no-such-option").first).to_be_visible()
    desk.look(page, "vm-refused")
    page.get_by_role("button", name=re.compile("Close.*Start failed")).click()
    expect(page.get_by_text("Start failed")).to_be_hidden()


def test_a_checkpoint_is_discarded_only_by_its_name(desk: Desk) -> None:
    guest = desk.lab.running()
    guest.save()
    kill_and_wait(guest.pid)
    page = desk.session()
    view(page, "vm", "web1")
    button(page, "Discard").click()
    dialog = page.get_by_role("dialog")
    expect(button(dialog, "Discard")).to_be_disabled()
    dialog.get_by_role("textbox").fill("web")
    expect(button(dialog, "Discard")).to_be_disabled()
    assert guest.state == "saved"
    dialog.get_by_role("textbox").fill("web1")
    desk.look(page, "vm-discard")
    dialog.get_by_role("textbox").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Stopped")


def test_a_held_guest_shows_its_evidence(desk: Desk) -> None:
    guest = desk.lab.running()
    guest.save()
    kill_and_wait(guest.pid)
    with guest.ram.open("r+b") as ram:
        ram.seek(5 << 20)
        ram.write(b"\xaa" * (4 << 20))
    page = desk.session()
    view(page, "vm", "web1")
    button(page, "Load").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Held")
    expect(page.get_by_text("Load failed")).to_be_visible()
    evidence = page.get_by_role("grid", name="Evidence")
    expect(evidence).to_contain_text("witness")
    expect(page.get_by_text("its RAM is not what it was")).to_have_count(1)
    expect(page.get_by_text("It is held.")).to_be_visible()
    expect(page.locator("code", has_text="cprctl status web1")).to_be_visible()
    expect(button(page, "Load")).not_to_have_class(re.compile("primary"))
    expect(page.get_by_text("Outdated")).to_be_hidden()
    desk.look(page, "vm-held")
    view(page)
    expect(row(page, "web1")).to_contain_text("Held")


def test_hostile_text_is_shown_as_text(desk: Desk) -> None:
    guest = desk.lab.guest("web1")
    guest.definition["vm"]["description"] = "<img src=x onerror=\"document.title='owned'\"> \u202egnp.exe"
    desk.lab.define(guest)
    page = desk.session()
    expect(row(page, "web1")).to_contain_text("<img src=x onerror=")
    expect(row(page, "web1")).to_contain_text(re.compile(r"\\u\{?202e\}?gnp\.exe"))
    assert page.title() == "Kernel and guests"
    assert page.locator("img[src=x]").count() == 0


def test_a_definition_that_cannot_be_used(desk: Desk) -> None:
    desk.lab.running()
    (desk.lab.definitions / "web1.toml").write_text("nonsense = true\n")
    desk.lab.client(lambda client: client.manager("Reload"))
    page = desk.session()
    expect(row(page, "web1")).to_contain_text("nonsense")


def test_reports_are_listed_and_drawn_and_downloaded(desk: Desk) -> None:
    guest = desk.lab.running()
    guest.save()
    guest.load()
    page = desk.session()
    page.get_by_role("link", name="Reports", exact=True).click()
    table = page.get_by_role("grid", name="Reports")
    expect(table).to_contain_text("web1")
    desk.look(page, "reports")
    table.get_by_role("link").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Load of web1")
    expect(page.get_by_role("img", name="web1: save")).to_be_visible()
    expect(page.get_by_role("grid", name="Guests")).to_contain_text(re.compile(r"save \d[\d.]*\u00a0m?s"))
    desk.look(page, "report")
    for name, begin in (("Page (HTML)", b"<!"), ("Picture (SVG)", b"<"), ("Data (JSON)", b"{")):
        with page.expect_download() as download:
            button(page, name).click()
        assert Path(download.value.path()).read_bytes().lstrip().startswith(begin)


def test_memory_is_drawn_for_each_device(desk: Desk) -> None:
    gib = 1 << 30
    device = {
        "node": "/dev/dax0.0",
        "uuid": "21dfda89-0355-4462-b7ed-7d7a01837540",
        "size_bytes": 4 * gib,
        "align_bytes": 2 << 20,
        "resource": 4 * gib,
        "numa_node": 0,
    }
    (desk.lab.root / "devices").write_text(json.dumps([device]))
    desk.lab.end_agent()
    desk.lab.start_agent((sys.executable, "-m", "tests.bus.mortal_agent", NEVER))
    desk.lab.guest("db", size="1G", device=f"uuid:{device['uuid']}", offset="1G")
    desk.lab.guest("web1")
    page = desk.session()
    page.get_by_role("link", name="Memory", exact=True).click()
    expect(page.get_by_role("img", name="3 GiB of 4 GiB are free")).to_be_visible()
    ranges = page.get_by_role("grid", name="Ranges of /dev/dax0.0")
    expect(ranges.get_by_role("row")).to_have_count(4)
    expect(ranges.get_by_role("link", name="db")).to_be_visible()
    expect(page.get_by_role("grid", name="RAM in files")).to_contain_text("web1")
    desk.look(page, "memory")


def test_a_host_without_persistent_memory(desk: Desk) -> None:
    page = desk.session()
    view(page, "memory")
    expect(page.get_by_role("heading", name="No persistent memory on this host")).to_be_visible()


@pytest.fixture
def host(lab: Lab) -> KexecLab:
    return KexecLab(lab, 2)


def test_an_upgrade_is_confirmed_leaves_and_comes_back_with_its_report(desk: Desk, host: KexecLab) -> None:
    page = desk.session()
    button(page, "Upgrade kernel…").click()
    dialog = page.get_by_role("dialog")
    go = button(dialog, f"Restart {HOST} into 6.12.2")
    expect(dialog.get_by_text("Predicted pause:")).to_be_visible()
    expect(go).to_be_disabled()
    name = dialog.get_by_label(f"Type {HOST} to confirm")
    name.fill("another")
    expect(go).to_be_disabled()
    dialog.get_by_label("Most pause").fill("-1")
    expect(dialog.get_by_text("A number above 0")).to_be_visible()
    dialog.get_by_label("Most pause").fill("")
    name.fill(HOST)
    expect(go).to_be_enabled()
    desk.look(page, "upgrade-dialog")
    go.click()
    expect(page.get_by_text(f"{HOST} is on its way into kernel 6.12.2")).to_be_visible()
    desk.look(page, "upgrade-leaving")
    until(lambda: host.under_way, "the kexec begins")
    page.goto("about:blank")
    host.reboot()
    host.agent(NEVER)
    assert host.lab.job("LoadAll") == "done"
    page.goto(desk.cockpits[-1].url)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Upgrade")
    expect(page.get_by_text("2 of 2 guests went on")).to_be_visible()
    desk.look(page, "upgrade-report")
    for guest in host.guests:
        guest.assert_unbroken()


@pytest.mark.usefixtures("host")
def test_an_upgrade_with_an_obstacle_cannot_begin(desk: Desk) -> None:
    page = desk.session()
    button(page, "Upgrade kernel…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label(f"Type {HOST} to confirm").fill(HOST)
    dialog.get_by_label("Most pause").fill("0.001")  # nothing was measured yet
    expect(dialog.get_by_text("1 obstacle").first).to_be_visible()
    expect(dialog.get_by_role("button", name=f"Restart {HOST}")).to_be_disabled()
    desk.look(page, "upgrade-obstacle")


def test_an_obstacle_that_an_admin_has_removed_is_none_when_checked_again(desk: Desk, host: KexecLab) -> None:
    def multifd(*, on: bool) -> None:
        host.guests[0].admin("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": on}])

    multifd(on=True)
    page = desk.session()
    button(page, "Upgrade kernel…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label(f"Type {HOST} to confirm").fill(HOST)
    expect(dialog.get_by_text("multifd")).to_be_visible()
    multifd(on=False)
    button(dialog, "Check again").click()
    expect(button(dialog, f"Restart {HOST} into 6.12.2")).to_be_enabled()


def test_a_job_shows_each_guest_and_is_cancelled(desk: Desk, tmp_path: Path) -> None:
    """The next QEMU of web1 waits for a writer at the FIFO."""
    lab, gate = desk.lab, tmp_path / "gate"
    waits = f'case "$*" in *-incoming*) [ ! -e {gate} ] || read line <{gate};; esac'
    slow = lab.guest("web1", qemu=script(tmp_path / "qemu", f'#!/bin/sh\n{waits}\nexec {lab.qemu} "$@"\n'))
    guests = [slow, lab.guest("web2")]
    for guest in guests:
        guest.start()
        guest.until_counts()
        guest.save()
    os.mkfifo(gate)
    page = desk.session()
    button(page, "Load all").click()
    button(page.get_by_role("dialog"), "Load all").click()
    expect(page.get_by_text("web1: ")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_be_visible()
    desk.look(page, "job", once=True)
    button(page, "Cancel").click()
    expect(page.get_by_text("cancelled, everything was taken back")).to_be_visible()
    slow.until_state("saved")
    gate.unlink()
    for guest in guests:
        if guest.state == "saved":
            guest.load()
        guest.assert_unbroken()


@pytest.mark.parametrize("act", ["save", "load"])
def test_all_guests_from_a_page_and_a_job_begun_elsewhere(desk: Desk, host: KexecLab, act: str) -> None:
    page = desk.session()
    if act == "load":
        assert host.lab.job("SaveAll") == "done"
        expect(row(page, "web2")).to_contain_text("Saved")
        expect(page.get_by_text("Save of all guests: done")).to_be_visible()
        button(page, "Load all").click()
        button(page.get_by_role("dialog"), "Load all").click()
    else:
        button(page, "Save all").click()
        button(page.get_by_role("dialog"), "Save all").click()
        expect(row(page, "web2")).to_contain_text("Saved")
        assert host.lab.job("LoadAll") == "done"
    expect(page.get_by_text("Load of all guests: done")).to_be_visible()
    for guest in host.guests:
        guest.assert_unbroken()


@pytest.fixture
def polkit(lab: Lab, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Starts a real polkitd on the lab's bus, with the agent's actions and this rule."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace and another user need root")
    started: list[subprocess.Popen[bytes]] = []
    let_others_in(lab)

    def start(rule: str) -> None:
        rules = tmp_path / "rules"
        rules.mkdir()
        rules.chmod(0o755)
        (rules / "50-test.rules").write_text(rule)
        mounts = f"mount --bind {ROOT}/policies /usr/share/polkit-1/actions && mount --bind {rules} /etc/polkit-1/rules.d"
        command = ["unshare", "--mount", "sh", "-c", f"{mounts} && exec /usr/lib/polkit-1/polkitd --no-debug"]
        started.append(subprocess.Popen(command, env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": lab.address}))
        ask = ["dbus-send", f"--bus={lab.address}", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
        ask += ["org.freedesktop.DBus.NameHasOwner", "string:org.freedesktop.PolicyKit1"]
        until(lambda: b"true" in subprocess.run(ask, check=True, capture_output=True).stdout, "polkitd is on the bus")

    yield start
    for daemon in started:
        daemon.terminate()
        daemon.wait(PATIENCE_S)


def test_a_session_that_may_not_look(desk: Desk, polkit: Callable[[str], None]) -> None:
    polkit("")
    desk.lab.running("secret1")
    page = desk.session(NOBODY)
    expect(page.get_by_role("heading", name="Limited access")).to_be_visible()
    assert "secret1" not in page.content()
    desk.look(page, "limited-no-look")


def test_a_session_that_may_look_and_not_touch(desk: Desk, polkit: Callable[[str], None]) -> None:
    polkit(RULE)
    guest = desk.lab.running()
    page = desk.session(NOBODY)
    expect(row(page, "web1")).to_contain_text("Running")
    expect(page.get_by_text("Saving, loading and upgrading need administrative access")).to_be_visible()
    desk.look(page, "limited-look")
    page.get_by_role("link", name="web1", exact=True).click()
    button(page, "Save").click()
    button(page.get_by_role("dialog"), "Save").click()
    expect(page.get_by_text("Save failed")).to_be_visible()
    guest.assert_unbroken()


def test_a_guest_is_started_by_keyboard_alone(desk: Desk) -> None:
    guest = desk.lab.guest("web1")
    page = desk.session()
    expect(row(page, "web1")).to_be_visible()
    tab_to(page, "web1")
    page.keyboard.press("Enter")
    expect(button(page, "Start")).to_be_enabled()
    tab_to(page, "Start")
    page.keyboard.press("Enter")
    guest.until_state("running")
    expect(button(page, "Force off")).to_be_enabled()
    tab_to(page, "Force off")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert guest.state == "running"


def tab_to(page: Page, name: str) -> None:
    """Press Tab until what has this text has the focus, and can be seen to have it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == name:
            return
    pytest.fail(f"Tab never comes to {name}")

# SPDX-License-Identifier: GPL-2.0-or-later
"""The page as an administrator has it: in Cockpit's shell, over TLS, after a login by PAM, while the host really kexecs."""

from __future__ import annotations

import queue
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Frame, FrameLocator, Locator, Page, expect

from tests.cockpit.conftest import WIDE, button, look, picture
from tests.host_vm import ROOT, build_guests, scenario_command
from tests.lab import PATIENCE_S as LAB_PATIENCE_S

HOST = "host-vm"
FRAME = "cockpit1:localhost/cpr-agent"
PASSWORD = secrets.token_urlsafe(12)
SAYS = """words => {
    if (document.body.innerText.includes("Rolled back"))
        throw new Error("the upgrade was taken back");
    return document.body.innerText.includes(words);
}"""
BOOT_S = 1800.0
PATIENCE_S = 900.0
"""How long anything may take in an emulated host on a slow day; nothing on a good one comes near."""
LIFE_S = 5400


class HostVm:
    """One of host-scenario; ``port`` of this machine is its Cockpit's."""

    def __init__(self, payload: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._payload = payload
        self._said: queue.Queue[str] = queue.Queue()

    @contextmanager
    def running(self) -> Iterator[None]:
        """From its start to its verdict, which it gives by itself; it is ended if something is raised meanwhile."""
        (page,) = ROOT.glob("build/cockpit-cpr-agent_*_all.deb")
        found = subprocess.run(["scripts/cockpit", "path", "host"], cwd=ROOT, check=True, capture_output=True, text=True)
        cockpit = Path(found.stdout.strip()).glob("*.deb")
        password = self._payload / "password"
        password.write_text(PASSWORD)
        payload = [build_guests(self._payload / "guests"), ROOT / "tests/guests/scenario-lib", password]
        options = ("--memory=2G", f"--port={self.port}:9090", "--deb", str(page), *map(str, cockpit))
        scenario = Path(__file__).parent / "host-scenario"
        out, command = scenario_command(scenario, "test-page", payload, LIFE_S, *options)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            listener = threading.Thread(target=self._listen, args=[run])
            listener.start()
            try:
                yield
                assert run.wait(BOOT_S) == 0, f"see {out}"
            finally:
                run.terminate()
                listener.join()

    def until_up(self) -> None:
        """Wait until its guests run, and its Cockpit."""
        deadline = time.monotonic() + BOOT_S
        while "page: up" not in (line := self._said.get(timeout=max(0.0, deadline - time.monotonic()))):
            assert line, "the host VM has ended"

    def _listen(self, run: subprocess.Popen[str]) -> None:
        """Until it ends, which is said by an empty line."""
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            self._said.put(line)
        self._said.put("")


def log_in(page: Page) -> None:
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()


def turn_on_administrative_access(page: Page) -> None:
    page.get_by_role("button", name="Limited access").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Password").fill(PASSWORD)
    button(dialog, "Authenticate").click()
    expect(page.get_by_role("button", name="Administrative access").first).to_be_visible()


def guest(inner: FrameLocator, name: str) -> Locator:
    """Its row of a table."""
    return inner.get_by_role("row", name=name)


@pytest.fixture
def patience() -> Iterator[None]:
    expect.set_options(timeout=PATIENCE_S * 1000)
    yield
    expect.set_options(timeout=LAB_PATIENCE_S * 1000)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("version", ["337"])
def test_a_page_is_open_while_its_host_kexecs(version: str, browser: Browser, tmp_path: Path) -> None:
    errors: list[str] = []
    host = HostVm(tmp_path)
    with host.running():
        context = browser.new_context(viewport=WIDE, color_scheme="light", locale="en-US", ignore_https_errors=True)
        page = context.new_page()
        page.emulate_media(reduced_motion="reduce")
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        host.until_up()
        try:
            upgrade(host, page, version)
        except BaseException:
            picture(page, f"host-failed-{version}")
            raise
        finally:
            context.close()
    assert errors == []


def frame(page: Page) -> Frame:
    """The page in Cockpit's shell, as it is now: the shell loads it anew."""
    found = page.frame(FRAME)
    assert found
    return found


def says(page: Page, words: str) -> None:
    """Wait for what is there for a moment alone: closer than `expect` looks. Fails when the upgrade was taken back."""
    frame(page).wait_for_function(SAYS, arg=words, polling=50)


def upgrade(host: HostVm, page: Page, version: str) -> None:
    inner = page.frame_locator(f"iframe[name='{FRAME}']")
    page.goto(f"https://127.0.0.1:{host.port}/cpr-agent")
    log_in(page)
    expect(inner.get_by_role("heading", name="Limited access").or_(guest(inner, "web1"))).to_be_visible()
    picture(page, f"host-limited-{version}")
    turn_on_administrative_access(page)
    expect(guest(inner, "web1")).to_contain_text("Running")
    expect(guest(inner, "web2")).to_contain_text("A new kernel")
    picture(page, f"host-overview-{version}")
    button(inner, "Upgrade kernel…").click()
    dialog = inner.get_by_role("dialog")
    dialog.get_by_label(f"Type {HOST} to confirm").fill(HOST)
    kernels = dialog.get_by_label("Kernel", exact=True)
    kernel = kernels.locator("option:not(:checked)").get_attribute("value")
    kernels.select_option(kernel)
    go = button(dialog, f"Restart {HOST} into {kernel}")
    expect(go).to_be_enabled()
    picture(page, f"host-upgrade-{version}")
    go.click()
    says(page, f"{HOST} restarts into kernel {kernel} once its guests are saved")
    picture(page, f"host-saving-{version}")
    says(page, f"{HOST} is on its way into kernel {kernel}")
    says(page, "This page will lose the host.")
    picture(page, f"host-leaving-{version}")
    expect(page.get_by_text("Disconnected").first).to_be_visible()
    picture(page, f"host-gone-{version}")
    host.until_up()
    button(page, "Reconnect").click()
    expect(page.get_by_label("User name")).to_be_visible()
    picture(page, f"host-login-{version}")
    log_in(page)
    expect(inner.get_by_role("heading", level=1)).to_contain_text(f"→ {kernel}")
    expect(inner.get_by_text("2 of 2 guests went on")).to_be_visible()
    expect(guest(inner, "web1")).to_contain_text(re.compile(r"\d\ss"))
    look(page, frame(page), f"host-report-{version}", version)
    frame(page).evaluate("cockpit.spawn(['sh', '-c', 'echo seen >/run/page-seen'], { superuser: 'require' })")

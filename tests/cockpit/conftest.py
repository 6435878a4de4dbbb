# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: a lab with an agent, a Cockpit of each version in front of it, and a real browser that shows the page."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Frame, FrameLocator, Locator, Page, expect, sync_playwright

from cpr_agent.bus.client import Client
from tests.bus.conftest import any_qemu, interruptible, running_lab, tiny
from tests.cockpit.cockpit_ws import VERSIONS, Cockpit, start_cockpit
from tests.cockpit.tally import PAGES, note_axe, note_case
from tests.lab import PATIENCE_S, ROOT, Lab, script

__all__ = ["any_qemu", "interruptible", "tiny"]

DIST = ROOT / "build/cockpit"
AXE = ROOT / "cockpit/node_modules/axe-core/axe.min.js"
WIDE: Any = {"width": 1280, "height": 900}
NARROW: Any = {"width": 420, "height": 900}
SCHEMES: Any = ("light", "dark")
TOO_WIDE = """[...document.querySelectorAll(
    "html, .pf-v6-c-page__main-container, .pf-v6-c-page__main, .pf-v6-c-modal-box__body"
)].some(one => one.scrollWidth > one.clientWidth + 1)"""
expect.set_options(timeout=PATIENCE_S * 1000)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    version = getattr(getattr(item, "callspec", None), "params", {}).get("version")
    if version and not report.skipped and (call.when == "call" or (call.when == "setup" and report.failed)):
        note_case(version, passed=report.passed)
    return report


class PageLab(Lab):
    """Playwright's loop has this thread, so the lab's own calls go from another one."""

    def client(self, work: Callable[[Client], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().client, work).result()


@dataclass
class Desk:
    """An admin before the page. ``lab`` is the host."""

    version: str
    lab: Lab
    browser: Browser
    directory: Path
    cockpits: list[Cockpit] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Of scripts of the page."""

    def session(self, user: str = "") -> Page:
        """Log in and open the page."""
        directory = self.directory / f"session-{len(self.cockpits)}"
        directory.mkdir()
        directory.chmod(0o755)
        (directory / "bin").mkdir()
        self.systemctl(directory / "bin/systemctl")
        cockpit = start_cockpit(self.version, directory, self.lab.address, DIST, user)
        self.cockpits.append(cockpit)
        page = self.browser.new_context(viewport=WIDE, color_scheme="light", locale="en-US").new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(cockpit.url)
        return page

    def systemctl(self, path: Path) -> None:
        """This machine has no systemd: to start the agent is to leave a file."""
        script(path, f'#!/bin/sh\n[ "$*" = "start cpr-agent.service" ] && touch {self.lab.root}/asked-to-start\n')

    def look(self, page: Page, name: str, *, once: bool = False) -> None:
        """Keep pictures of it, and let axe judge it. ``once`` is for what passes."""
        look(page, page, f"{name}-{self.version}", self.version, once=once)

    def end(self) -> None:
        for cockpit in self.cockpits:
            with contextlib.suppress(ProcessLookupError):
                cockpit.end()
            print(f"--- {cockpit.log}\n{cockpit.log.read_text()}")


def picture(page: Page, name: str) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PAGES / f"{name}.png", full_page=False, animations="disabled")


def look(page: Page, frame: Page | Frame, name: str, version: str, *, once: bool = False) -> None:
    """Keep pictures of a page, and let axe judge what is in ``frame``: light and dark, wide and narrow; or ``once``."""
    found = []
    for scheme in SCHEMES[:1] if once else SCHEMES:
        for size in (WIDE,) if once else (WIDE, NARROW):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.set_viewport_size(size)
            picture(page, f"{name}-{scheme}-{size['width']}")
            too_wide = frame.evaluate(TOO_WIDE)
            assert not too_wide, f"{name} is wider than {size['width']} px"
            frame.evaluate(AXE.read_text() + "; undefined")
            result = frame.evaluate("axe.run(document, { resultTypes: ['violations'] })")
            found += [
                f"{scheme} {size['width']}: {one['id']}: {node['html'][:200]} {node['failureSummary']}"
                for one in result["violations"]
                for node in one["nodes"]
            ]
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(WIDE)
    note_axe(version, len(found))
    assert not found, "\n".join(found)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("no chromium here; get it with: scripts/bootstrap --cockpit")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(params=sorted(VERSIONS))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lab(tmp_path: Path, tiny: Path, any_qemu: str) -> Iterator[Lab]:
    yield from running_lab(tmp_path, tiny, any_qemu, PageLab)


@pytest.fixture
def desk(version: str, lab: Lab, browser: Browser, tmp_path: Path) -> Iterator[Desk]:
    running = Desk(version, lab, browser, tmp_path)
    yield running
    for context in browser.contexts:
        for number, page in enumerate(context.pages):
            with contextlib.suppress(Exception):
                picture(page, f"last-{version}-{number}")
        context.close()
    running.end()
    assert running.errors == []


def row(page: Page, name: str) -> Locator:
    """Of the table of guests."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def button(where: Page | FrameLocator | Locator, name: str) -> Locator:
    return where.get_by_role("button", name=re.compile(f"^{re.escape(name)}$"))

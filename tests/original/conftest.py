# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMUs that have cpr-save and cpr-load: those of `make qemu-cpr`, and that of Debian 14 where somebody has built it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.bus.conftest import each_lab, lab, linux, saved, tiny
from tests.original.machine import Desk, original_qemu
from tests.original.tally import note

__all__ = ["each_lab", "lab", "linux", "saved", "tiny"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped:
        note("case", item.name)
        if report.passed:
            note("kept", item.name)
    return report


@pytest.fixture(params=["12", "13", "14"], ids=["7.2", "10.0", "10.2"])
def each_qemu(request: pytest.FixtureRequest) -> str:
    return original_qemu(request.param)


@pytest.fixture(scope="session")
def any_qemu() -> str:
    return original_qemu("13")


@pytest.fixture
def shm() -> Iterator[Path]:
    """For RAM."""
    directory = Path(tempfile.mkdtemp(prefix="cpr-agent-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def desk(each_qemu: str, tmp_path: Path, shm: Path, tiny: Path) -> Iterator[Desk]:
    desk = Desk(each_qemu, tmp_path, shm, tiny)
    yield desk
    desk.close()
    log = tmp_path / "qemu.log"
    if log.exists():
        print(f"--- {log}\n{log.read_text()}")

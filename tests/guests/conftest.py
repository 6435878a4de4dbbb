# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/bus, for other guests, other memory and other QEMUs too."""

from collections.abc import Generator

import pytest

from tests.bus.conftest import any_qemu, each_lab, each_qemu, lab, linux, linux_with_agent, saved, tiny
from tests.guests.tally import note

__all__ = ["any_qemu", "each_lab", "each_qemu", "lab", "linux", "linux_with_agent", "saved", "tiny"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "counted: each test is a case of the tally")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and item.get_closest_marker("counted"):
        note("case", item.name)
        if report.passed:
            note("kept", item.name)
    return report

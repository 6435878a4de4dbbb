# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a kernel has the drivers of the guests' memory, without which they are held after the kexec."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.host.kernels.modules import SYMBOLS, Drivers


def about_drivers(kernel: Kernel, drivers: Drivers, wanted: Collection[str]) -> Iterator[Finding]:
    unchecked = []
    for driver in sorted(wanted):
        value = drivers.set_to(driver)
        missing = drivers.modules.lacks(driver) if drivers.modules else "modules.dep"
        if value == "y" or not missing:
            continue
        if value == "n":
            yield _lacks(kernel, driver, "driver-not-configured", f"it was built without CONFIG_{SYMBOLS[driver]}")
        elif value == "m" or (drivers.modules and driver in SYMBOLS):
            yield _lacks(kernel, driver, "driver-not-installed", f"{missing} is not there")
        elif drivers.modules:
            yield Finding(
                severity="warning",
                code="driver-not-found",
                what=f"kernel {kernel.version} may lack the driver {driver}: {missing} is not there",
                why="a part of a kernel that can't be a module is listed nowhere, so this may be a false alarm",
                remedy="choose a kernel that is known to find the guests' memory",
            )
        else:
            unchecked.append(driver)
    if unchecked:
        yield Finding(
            severity="warning",
            code="drivers-not-checked",
            what=f"nothing tells whether kernel {kernel.version} has the drivers {', '.join(unchecked)}",
            why="it has no config or modules.dep; without a driver the guests' memory would not appear again",
            remedy="choose a kernel that is known to find the guests' memory, or install its modules",
        )


def _lacks(kernel: Kernel, driver: str, code: str, because: str) -> Finding:
    return Finding(
        severity="error",
        code=code,
        what=f"kernel {kernel.version} lacks the driver {driver}: {because}",
        why="the guests' memory would not appear after the kexec, and they would be held",
        remedy="choose another kernel"
        if code == "driver-not-configured"
        else "install all of its modules (a package such as linux-modules-extra), or choose another kernel",
    )

# SPDX-License-Identifier: GPL-2.0-or-later
"""What the packages' sources say of each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INCLUDED = {"qemu.qmp"}
"""In the packages themselves (ADR 2)."""


def modules(text: str) -> set[str]:
    """Debian and Fedora have the same names for them."""
    return set(re.findall(r"\bpython3-([a-z][\w-]+)", text))


def test_both_packages_require_the_libraries_that_the_agent_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=]", library)[0] for library in project["dependencies"]} - INCLUDED
    control = (ROOT / "packaging/debian/control").read_text().partition("\nDepends:")[2].partition("\nRecommends:")[0]
    requires = re.findall(r"^Requires: +(.*)$", (ROOT / "packaging/rpm/cpr-agent.spec").read_text(), re.MULTILINE)
    assert modules(control) == wanted
    assert modules(" ".join(requires)) == wanted

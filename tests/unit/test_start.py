# SPDX-License-Identifier: GPL-2.0-or-later
"""Which modules a start of the agent imports, for which guests wait at boot: the rule and the tables of ADR 27."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpr_agent.bus import library

ROOT = Path(__file__).parent.parent.parent
AGENT = ROOT / "agent/cpr_agent"
ADR = ROOT / "docs/adr/0027-what-a-start-imports.md"
PROGRAM = """
import sys
sys.argv[1:] = ["--version"]
try:
    import cpr_agent.__main__
except SystemExit:
    print(*(name for name, module in sys.modules.items() if module))
"""


def imported(program: str) -> set[str]:
    """The names that ``program`` prints last."""
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.splitlines()[-1].split())


def table(head: str) -> set[str]:
    """The modules of the table whose head starts with ``head``."""
    text = ADR.read_text().partition(f"| {head} | ")[2].partition("\n\n")[0]
    return set(re.findall(r"`([\w.]+)`", text))


@pytest.fixture(scope="module")
def started() -> set[str]:
    return imported(PROGRAM)


def test_a_start_imports_each_module_of_the_agent_that_is_not_in_the_tables(started: set[str]) -> None:
    every = {path.relative_to(AGENT).with_suffix("").as_posix().replace("/", ".") for path in AGENT.rglob("*.py")}
    every = {name.removesuffix("__init__").rstrip(".") for name in every} - {"", "__main__"}
    named = table("late") | table("other program")
    assert named <= every
    spared = {name for name in every for one in named if name == one or name.startswith(f"{one}.")} - {"host.kernels"}
    assert {name.removeprefix("cpr_agent.") for name in started if name.startswith("cpr_agent.")} == every - spared


def test_a_start_takes_along_no_library_that_no_guest_waits_for(started: set[str]) -> None:
    needless = {
        "_ssl",
        "click",
        "gi",
        "jinja2",
        "lxml",
        "pystemd.base",
        "rich",
        "secrets",
        "ssl",
        "tenacity",
        "typing_extensions",
    }
    assert {"asyncio", library.name(), "msgspec", "qemu.qmp"} <= started
    assert needless.isdisjoint(started)


def test_a_start_without_arguments_has_no_parser_for_them() -> None:
    assert "argparse" not in imported("import cpr_agent.daemon, sys; print(*sys.modules)")


def test_what_was_kept_out_of_the_start_can_be_imported_after_it() -> None:
    program = PROGRAM + "import ssl, typing_extensions\nprint(ssl.create_default_context.__name__)"
    assert imported(program) == {"create_default_context"}


def test_a_late_module_is_named_like_any_other() -> None:
    program = "from cpr_agent.core import acts\nimport sys\nname = 'cpr_agent.core.acts.save'\n"
    program += "print(name in sys.modules, acts.save.save.__module__ == name, hasattr(acts, 'sav'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["False", "True", "False"]

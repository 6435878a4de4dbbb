# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may import whom, and which part has which library: the tables of ADR 15, held against every import of the agent."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.source import parsed

ROOT = Path(__file__).parent.parent.parent
AGENT = ROOT / "agent/cpr_agent"
ADR = ROOT / "docs/adr/0015-imports-point-one-way.md"


class Import(NamedTuple):
    """``target`` is a module below cpr_agent, as ``vm.launch``; or, where ``ours`` is false, a library."""

    file: str
    target: str
    ours: bool

    @property
    def part(self) -> str:
        """The package, or the module beside the packages, that the importing file is in."""
        return part_of(self.file.removesuffix(".py").replace("/", "."))


def part_of(module: str) -> str:
    return module.partition(".")[0].replace("__init__", "version")


def imports(root: Path) -> list[Import]:
    """All of them: within functions, for the type checker alone, and names of our modules in strings."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        package = ["cpr_agent", *file.parent.parts]
        for module in (name for node in ast.walk(parsed(path)) for name in _modules(node, package)):
            first, _, rest = module.partition(".")
            if first == "cpr_agent":
                found.append(Import(str(file), _existing(root, rest), ours=True))
            elif first not in sys.stdlib_module_names:
                found.append(Import(str(file), first, ours=False))
    return found


def _modules(node: ast.AST, package: list[str]) -> Iterator[str]:
    """The modules that ``node`` names, each with what is imported from it: that may be a module as well."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            above = package[: len(package) + 1 - level] if level else []
            yield from (".".join([*above, *([module] if module else []), alias.name]) for alias in names)
        case ast.Constant(value=str(text)) if re.fullmatch(r"cpr_agent(\.\w+)+", text):  # as importlib takes it
            yield text


def _existing(root: Path, dotted: str) -> str:
    """``dotted`` without the names at its end that are no modules but what is in one."""
    parts = dotted.split(".")
    while parts and not (root.joinpath(*parts).is_dir() or root.joinpath(*parts).with_suffix(".py").exists()):
        parts.pop()
    return ".".join(parts) or "version"


def table(head: str) -> dict[str, set[str]]:
    """The table of the ADR whose first column is ``head``."""
    text = ADR.read_text().partition(f"| {head} | ")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`([\w.]+)`", cell)) for name, cell in rows}


def refused(found: list[Import], allowed: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {
        (one.file, one.target)
        for one in found
        if one.ours and one.part != part_of(one.target) and not {one.target, part_of(one.target)} & allowed[one.part]
    }


def test_no_import_points_where_the_table_has_no_arrow() -> None:
    found = refused(imports(AGENT), table("part"))
    assert found == set(), "not in the table of ADR 15"


def test_the_table_has_each_part_of_the_agent_and_no_other() -> None:
    modules = {path.stem for path in AGENT.glob("*.py")}
    packages = {path.parent.name for path in AGENT.glob("*/__init__.py")}
    assert table("part").keys() == {part_of(name) for name in modules | packages}


def test_the_table_s_arrows_point_one_way() -> None:
    arrows = {part: {part_of(target) for target in targets} for part, targets in table("part").items()}
    order = list(TopologicalSorter(arrows).static_order())  # raises CycleError
    assert order.index("core") < order.index("report") < order.index("bus") < order.index("cli")


def test_a_library_is_imported_by_the_parts_that_the_table_names() -> None:
    importers: dict[str, set[str]] = {}
    for one in imports(AGENT):
        if not one.ours:
            importers.setdefault(one.target, set()).add(one.part)
    assert importers == table("library")
    assert {library for library, parts in importers.items() if len(parts) > 1} == {"msgspec"}


@pytest.mark.parametrize(
    "line",
    [
        "import cpr_agent.cli.tables",
        "from cpr_agent.cli import tables",
        "from cpr_agent.cli.tables import vms",
        "from cpr_agent import cli",
        "from ..cli import tables",
        "from .. import cli",
        "def late():\n    from cpr_agent.cli.tables import vms",
        "if TYPE_CHECKING:\n    from cpr_agent.cli.tables import vms",
        "import_module('cpr_agent.cli.tables')",
    ],
)
def test_an_arrow_that_is_not_allowed_is_found_however_it_is_written(tmp_path: Path, line: str) -> None:
    for name in ("cli", "core"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "cli/tables.py").touch()
    (tmp_path / "core/vm.py").write_text(f"from cpr_agent.errors import Busy\n{line}\n")
    (tmp_path / "errors.py").touch()
    ((file, target),) = refused(imports(tmp_path), table("part"))
    assert (file, part_of(target)) == ("core/vm.py", "cli")


def test_of_core_the_command_line_may_import_the_words_alone(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "core").mkdir()
    for name in ("cli/__init__", "core/__init__", "core/states", "core/jobs"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "cli/main.py").write_text("from cpr_agent.core.states import Policy\nfrom cpr_agent.core.jobs import Job\n")
    assert refused(imports(tmp_path), table("part")) == {("cli/main.py", "core.jobs")}


def test_cprctl_starts_without_what_only_tables_and_the_agent_need() -> None:
    """It is part of a boot: guests wait for it (`cprctl load --all`)."""
    code = "import sys, cpr_agent.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "cpr_agent.core.states" in loaded
    assert not {"rich", "jinja2", "cpr_agent.core.model", "cpr_agent.report.story"} & set(loaded)

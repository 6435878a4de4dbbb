# SPDX-License-Identifier: GPL-2.0-or-later
"""Each file that git knows says which licence it has: in a line of its own, or in REUSE.toml where it can't carry one."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LICENCE = "GPL-2.0-or-later"
COMMENTS = {
    ".c": "/* {} */",
    ".css": "/* {} */",
    ".html": "<!-- {} -->",
    ".j2": "{{# {} #}}",
    ".js": "// {}",
    ".ld": "/* {} */",
    ".policy": "<!-- {} -->",
    ".scd": "; {}",
    ".ts": "// {}",
    ".tsx": "// {}",
    ".xml": "<!-- {} -->",
    "org.cpragent1.conf": "<!-- {} -->",
    "50-cpr-operators.rules": "// {}",
}
"""How a line becomes a comment, by the end of a file's name; all others have ``#``."""
HEAD = 4
"""The line stands within the first ones: only a line that must come first (``#!``, ``#compdef``, ``---``) is before it."""
THE_TEXT_ITSELF = "COPYING"


def licence_line(path: str) -> str:
    """The line that a file has to have."""
    comment = next((comment for end, comment in COMMENTS.items() if path.endswith(end)), "# {}")
    return comment.format(f"SPDX-License-Identifier: {LICENCE}")


def annotated() -> list[str]:
    """The patterns of files that have their licence in REUSE.toml."""
    annotations = tomllib.loads((ROOT / "REUSE.toml").read_text())["annotations"]
    return [pattern for one in annotations if one.get("SPDX-License-Identifier") == LICENCE for pattern in one["path"]]


def matches(path: str, pattern: str) -> bool:
    """As REUSE has it: ``*`` is anything but a slash, ``**`` anything."""
    parts = {"**": ".*", "*": "[^/]*"}
    return bool(re.fullmatch("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*?)", pattern)), path))


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [path for path in listed if path != THE_TEXT_ITSELF and (ROOT / path).is_file()]


def unlicensed() -> list[str]:
    """The files that have neither."""
    patterns = annotated()
    bare = (path for path in files() if not any(matches(path, pattern) for pattern in patterns))
    return [path for path in bare if licence_line(path) not in (ROOT / path).read_text().splitlines()[:HEAD]]


def test_each_file_has_its_licence() -> None:
    assert {path: f"add the line {licence_line(path)!r}" for path in unlicensed()} == {}


def test_each_entry_of_reuse_toml_is_of_use() -> None:
    known = files()
    for pattern in annotated():
        assert any(matches(path, pattern) for path in known), pattern


@pytest.mark.parametrize(
    ("path", "pattern", "matched"),
    [
        ("docs/adr/README.md", "**.md", True),
        ("docs/adr/README.md", "*.md", False),
        ("tests/unit/libvirt/running", "tests/unit/libvirt/*", True),
        ("docs/reportXsvg", "docs/report.svg", False),
    ],
)
def test_patterns_are_those_of_reuse(path: str, pattern: str, *, matched: bool) -> None:
    assert matches(path, pattern) == matched


def test_the_licence_is_the_one_of_the_packages() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]["text"] == LICENCE
    assert (ROOT / "packaging/rpm/cpr-agent.spec").read_text().count(f"\nLicense:        {LICENCE} AND ") == 2
    assert "Version 2, June 1991" in (ROOT / THE_TEXT_ITSELF).read_text()

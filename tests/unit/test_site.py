# SPDX-License-Identifier: GPL-2.0-or-later
"""The site that `make docs` builds: its pages are made, and what they refer to is there, without MkDocs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "packaging/site/hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, *HOOKS.AT_THE_TOP])
def test_references_of_a_document_lead_somewhere(page: str) -> None:
    text = (ROOT / HOOKS.origin(page)).read_text()
    HOOKS.with_references(page, HOOKS.LINK.sub(lambda link: HOOKS.target(page, link[1]), text))


def test_references_of_the_man_pages_lead_somewhere() -> None:
    pages = {name: HOOKS.man_page(source) for name, source in HOOKS.man_sources()}
    assert set(pages) == set(HOOKS.man_names())
    assert "[cprctl(1)](cprctl.1.md)" in pages["cpr-agent.7"]
    assert "[/usr/share/doc/cpr-agent/quick-start.md](../quick-start.md)" in pages["cpr-agent.7"]


@pytest.mark.parametrize("text", ["see cpr-nothing(7)", "see *cprctl*(8)", "see /usr/share/doc/cpr-agent/nothing.md"])
def test_a_reference_of_a_man_page_to_nothing_is_an_error(text: str) -> None:
    with pytest.raises(HOOKS.BrokenReference):
        HOOKS.with_references("page.md", HOOKS.man_page(f"cpr(1)\n\n{text}\n"))


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(HOOKS.BrokenReference):
        HOOKS.target("limits.md", "nothing.md")


def test_links_are_those_of_the_site() -> None:
    assert HOOKS.target("CONTRIBUTING.md", "docs/bench.md") == "bench.md"
    assert HOOKS.target("adr/README.md", "0004-state-is-derived.md") == "0004-state-is-derived.md"
    assert HOOKS.target("adr/README.md", "../../NEWS.md") == "../NEWS.md"
    assert HOOKS.target("adr/README.md", "../../COPYING") == "../source/COPYING.txt"
    assert HOOKS.with_references("adr/README.md", "cprctl(1)") == "[cprctl(1)](../man/cprctl.1.md)"
    assert HOOKS.with_references("limits.md", "`cprctl(1)`, or\n\n    cprctl(1)\n") == "`cprctl(1)`, or\n\n    cprctl(1)\n"


SCDOC = """name(1)
; a comment

# OPTIONS

*--one* _VALUE_|_none_
	First, with <tag> and web\\_1.

	*--nested*
		Inner.

- entry

```
as it *is*
```
"""

MARKDOWN = """# name(1)

## OPTIONS

<b>--one</b> <i>VALUE</i>|<i>none</i>
:   First, with &lt;tag> and web\\_1.

    <b>--nested</b>
    :   Inner.

- entry


    as it *is*
"""


def test_a_man_page_becomes_markdown() -> None:
    made = HOOKS.man_page(SCDOC)
    assert [line for line in made.splitlines() if line] == [line for line in MARKDOWN.splitlines() if line]

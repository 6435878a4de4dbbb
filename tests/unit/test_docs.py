# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers in the documents are computed, not typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.errors import CprError
from cpr_agent.memory.witness import DEFAULT_PAGES

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
TEXT = (DOCS / "witness.md").read_text()


def test_the_table_of_the_witness_is_its_formula() -> None:
    rows = re.findall(r"^\| ([\d.]+ %|one page of 4 GiB)[^|]*\| [^|]* \| ([^|]*) \| ([^|]*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 7
    for fraction, missed, noticed in rows:
        f = 4096 / (4 << 30) if fraction.startswith("one") else float(fraction.split()[0]) / 100
        p = (1 - f) ** DEFAULT_PAGES
        assert float(missed) == float(f"{p:.0e}" if p < 1e-3 else f"{p:.3f}"), (fraction, p)
        if noticed != "always":
            assert abs(float(noticed) - (1 - p)) < 0.001
        else:
            assert p < 1e-12


def test_the_witness_samples_as_many_pages_as_its_document_says() -> None:
    assert f"n = {DEFAULT_PAGES:,}" in TEXT
    assert f"{DEFAULT_PAGES:,} pages of 4 KiB" in TEXT


def test_each_error_has_a_section_that_says_what_to_do() -> None:
    def family(error: type[CprError]) -> set[str]:
        return {error.kind}.union(*map(family, error.__subclasses__()))

    sections = re.findall(r"^### (\w+)\n(?=\S)", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(family(CprError))


def test_each_phase_of_an_upgrade_is_explained() -> None:
    table = (ROOT / "docs/operations.md").read_text().partition("## A guest is held")[0]
    explained = {
        word for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for word in re.findall(r"`([\w-]+)`", row)
    }
    passing = {Phase.CHECKING, Phase.CHECKED, Phase.ROLLING_BACK}
    assert explained == set(Phase) - passing


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")]


def links(page: Path) -> list[tuple[str, str]]:
    """File and anchor of each link and picture; either may be empty."""
    return re.findall(r"\]\((?![a-z]+:)([^)#]*)#?([^)]*)\)", page.read_text())


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    for page in DOCUMENTS:
        for target, anchor in links(page):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_installed_documents_link_to_installed_ones_alone() -> None:
    """`make install` puts docs/ into one directory, with the decisions and the schema below it."""
    patterns = ("*.md", "*.svg", "adr/*.md", "schema/*.json")
    installed = {path.resolve() for pattern in patterns for path in DOCS.glob(pattern)}
    for page in DOCS.rglob("*.md"):
        for target, _ in links(page):
            assert not target or (page.parent / target).resolve() in installed, f"{page.name}: {target}"


def test_each_document_is_in_the_index() -> None:
    for folder in (DOCS, DOCS / "adr"):
        index = {target for target, _ in links(folder / "README.md")}
        assert {path.name for path in folder.glob("*.md")} - {"README.md"} <= index


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_the_way_around_the_code_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w-]+(?:/[\w.-]*)+|errors\.py)`", text)
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "agent/cpr_agent" / path).exists(), path


def test_each_member_of_the_contract_is_described() -> None:
    """By a comment inside of it; org.cpragent1(5) is made of these."""
    contract, operations = ROOT / "agent/cpr_agent/bus/org.cpragent1.xml", ROOT / "docs/operations.md"
    command = [sys.executable, *map(str, (ROOT / "packaging/man/interface", contract, operations))]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr

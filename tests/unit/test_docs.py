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
TEXT = (ROOT / "docs/witness.md").read_text()


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


def test_links_between_documents_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_member_of_the_contract_is_described() -> None:
    """By a comment inside of it; org.cpragent1(5) is made of these."""
    contract, operations = ROOT / "agent/cpr_agent/bus/org.cpragent1.xml", ROOT / "docs/operations.md"
    command = [sys.executable, ROOT / "packaging/man/interface", contract, operations]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr

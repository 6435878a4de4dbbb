"""Numbers in the documents are computed, not typed."""

from __future__ import annotations

import re
from pathlib import Path

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

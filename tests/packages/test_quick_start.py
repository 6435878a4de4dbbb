# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of docs/quick-start.md, as they stand there, on a host whose memory `memmap=` sets aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.host_vm import ROOT, run_scenario

TIMEOUT_S = 2400
BLOCK = re.compile(
    r"^```(sh run(?: (?P<how>kexec|yes))?|(?:toml definition|conf (?P<append>append)) file=(?P<file>\S+))\n"
    r"(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


def write_steps(target: Path, text: str) -> int:
    """Each marked block as a script of its own, whose suffix says how it is run; returns how many of them end in a
    kexec."""
    target.mkdir()
    blocks = list(BLOCK.finditer(text))
    for number, block in enumerate(blocks, 1):
        into = ">>" if block["append"] else ">"
        step = f"cat {into}{block['file']} <<'END'\n{block['text']}END\n" if block["file"] else block["text"]
        (target / f"{number:02}.{block['how'] or 'sh'}").write_text(step)
    return [block["how"] for block in blocks].count("kexec")


def test_its_commands_do_what_they_say(tmp_path: Path) -> None:
    kexecs = write_steps(tmp_path / "steps", (ROOT / "docs/quick-start.md").read_text())
    assert kexecs == 2
    # Without the NVDIMM that this host has as well: the quick start's reader has none.
    options = ("--memory", "8G", "--append", "memmap=5G!4G module_blacklist=nfit", "--allow-reboot")
    scenario = ROOT / "tests/packages/quick-start-scenario"
    out, verdict = run_scenario(scenario, "test-quick-start", [tmp_path / "steps"], TIMEOUT_S, *options)
    assert verdict == 0, f"see {out}"
    history = json.loads((out / "artefacts/history.json").read_text())
    assert [entry["vm"] for entry in history] == ["web1"] * kexecs

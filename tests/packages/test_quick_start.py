# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of docs/quick-start.md, as they stand there, on a host whose memory `memmap=` sets aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.host_vm import ROOT, run_scenario

TIMEOUT_S = 2400
BLOCK = re.compile(
    r"^```(sh run(?P<kexec> kexec)?|toml definition file=(?P<file>\S+))\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


def write_steps(target: Path) -> int:
    """Each marked block as a script of its own; returns how many of them end in a kexec."""
    target.mkdir()
    kexecs = 0
    for number, block in enumerate(BLOCK.finditer((ROOT / "docs/quick-start.md").read_text()), 1):
        kexecs += bool(block["kexec"])
        text = f"cat >{block['file']} <<'END'\n{block['text']}END\n" if block["file"] else block["text"]
        (target / f"{number:02}.{'kexec' if block['kexec'] else 'sh'}").write_text(text)
    return kexecs


def test_its_commands_do_what_they_say(tmp_path: Path) -> None:
    kexecs = write_steps(tmp_path / "steps")
    assert kexecs == 2
    # Without the NVDIMM that this host has as well: the quick start's reader has none.
    options = ("--memory", "8G", "--append", "memmap=5G!4G module_blacklist=nfit", "--allow-reboot")
    scenario = ROOT / "tests/packages/quick-start-scenario"
    out, verdict = run_scenario(scenario, "test-quick-start", [tmp_path / "steps"], TIMEOUT_S, *options)
    assert verdict == 0, f"see {out}"
    history = json.loads((out / "artefacts/history.json").read_text())
    assert [entry["vm"] for entry in history] == ["web1"] * kexecs

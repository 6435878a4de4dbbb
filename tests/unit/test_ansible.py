# SPDX-License-Identifier: GPL-2.0-or-later
"""The role's settings are described where an admin looks them up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
ROLE = ROOT / "packaging/ansible/roles/cpr_agent_upgrade"
OF_THE_PLAYBOOK = {"hosts", "serial", "max_fail_percentage"}


def options() -> dict[str, Any]:
    spec = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    return {name.removeprefix("cpr_agent_upgrade_"): option for name, option in spec.items()}


def test_each_setting_of_the_role_is_specified_with_its_default() -> None:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    known = options()
    assert {name.removeprefix("cpr_agent_upgrade_") for name in defaults} == {*known} - OF_THE_PLAYBOOK
    for name, option in known.items():
        if "default" in option:
            assert option["default"] == defaults[f"cpr_agent_upgrade_{name}"], name


def test_the_playbook_has_the_others() -> None:
    text = (ROOT / "packaging/ansible/upgrade-hosts.yml").read_text()
    assert set(re.findall(r"\{\{ cpr_agent_upgrade_(\w+)", text)) == OF_THE_PLAYBOOK


def test_each_setting_is_in_the_document() -> None:
    tables = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/fleets.md").read_text(), re.MULTILINE)
    documented = {name for row in tables for name in re.findall(r"`(\w+)`", row)}
    assert documented >= {*options()}


def test_the_example_sets_what_there_is() -> None:
    example = ROOT / "packaging/ansible/inventory.example"
    text = "".join(path.read_text() for path in example.rglob("*.yml"))
    assert set(re.findall(r"cpr_agent_upgrade_(\w+):", text)) <= {*options()}

# SPDX-License-Identifier: GPL-2.0-or-later
"""The man pages say all there is: what is not in its page fails here."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree

import click
import msgspec
import pytest

from cpr_agent.cli import session
from cpr_agent.cli.main import cli
from cpr_agent.core.model import Bytes, Definition, Seconds
from cpr_agent.core.settings import Settings
from cpr_agent.daemon import arguments

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "packaging/man"


def page(name: str) -> str:
    """As scdoc reads it, without its backslashes."""
    return (PAGES / f"{name}.scd").read_text().replace("\\", "")


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        elif not command.hidden:
            yield path + name, command


def options(command: click.Command) -> set[str]:
    return {
        flag
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag.startswith("--")
    }


def entries(text: str) -> dict[str, str]:
    """What each entry's head line is followed by, up to the next one at the margin."""
    found: dict[str, str] = {}
    for head, body in re.findall(r"^(\S.*)\n((?:\t.*\n|\n(?=\t))+)", text, re.MULTILINE):
        found[head] = found.get(head, "") + body
    return found


@pytest.mark.parametrize("name", [name for name, _ in commands(cli)])
def test_each_command_is_in_cprctl_1_with_all_its_options(name: str) -> None:
    command = dict(commands(cli))[name]
    told = [head + body for head, body in entries(page("cprctl.1")).items() if re.match(rf"\*{name}[ *]", head)]
    assert told, f"cprctl {name} has no entry"
    missing = {flag for flag in options(command) if not any(f"{flag}*" in text for text in told)}
    assert not missing, f"cprctl {name}: {missing}"


def test_each_command_that_cprctl_1_has_is_there() -> None:
    section = page("cprctl.1").partition("# COMMANDS")[2].partition("# EXIT STATUS")[0]
    heads = [head for head in entries(section) if head.startswith("*")]
    known = [name for name, _ in commands(cli)]
    for head in heads:
        words = re.findall(r"[\w-]+", head)
        assert any(words[: len(name.split())] == name.split() for name in known), head


def test_the_options_before_a_command_are_in_cprctl_1() -> None:
    section = page("cprctl.1").partition("# OPTIONS")[2].partition("# COMMANDS")[0]
    assert {flag for flag in options(cli) if f"*{flag}*" not in section} == set()


def test_each_exit_status_is_in_cprctl_1() -> None:
    section = page("cprctl.1").partition("# EXIT STATUS")[2].partition("\n# ")[0]
    known = {str(value) for name, value in vars(session).items() if name.startswith("EXIT_")}
    assert set(re.findall(r"^\*(\d+)\*$", section, re.MULTILINE)) == known | {"0"}


def keys(kind: Any, section: str = "") -> Iterator[tuple[str, object]]:
    """Each key below the sections of ``kind``, as section.key, and its default."""
    for field in msgspec.structs.fields(kind):
        name = f"{section}.{field.name}".lstrip(".").replace("_", "-")
        inner = get_type_hints(kind)[field.name]
        nested = [one for one in (inner, *get_args(inner)) if isinstance(one, type) and issubclass(one, msgspec.Struct)]
        for one in nested:
            yield from keys(one, name)
        if section and not nested:
            yield name, field.default


def written(default: object) -> str:
    """A default as TOML has it."""
    match default:
        case Bytes() | Seconds():
            return f'"{default:g}s"' if isinstance(default, Seconds) else f'"{int(default)}"'
        case bool():
            return str(default).lower()
        case tuple():
            return "[" + ", ".join(map(written, default)) + "]"
        case int():
            return str(default)
        case _:
            return f'"{default}"'


@pytest.mark.parametrize(("name", "kind"), [("cpr-agent.toml.5", Settings), ("cpr-vm.toml.5", Definition)])
def test_each_key_is_in_its_page_with_its_default(name: str, kind: Any) -> None:
    told: dict[str, str] = {}
    for section, text in re.findall(r"^# \[+([\w.-]+)\]+\n(.*?)(?=^# )", page(name), re.MULTILINE | re.DOTALL):
        for key, default in re.findall(r"^\*([\w-]+)\*(?: = (.*))?$", text, re.MULTILINE):
            told[f"{section}.{key}"] = default
    known = dict(keys(kind))
    assert set(told) == set(known)
    for key, default in known.items():
        must_be_given = default is msgspec.NODEFAULT or key in ("memory.size", "memory.device")
        assert told[key] == ("" if must_be_given else written(default)), key


def test_each_option_of_the_daemon_is_in_its_page() -> None:
    told = page("cpr-agentd.8").partition("# OPTIONS")[2].partition("\n# ")[0]
    parser: argparse.ArgumentParser = arguments()
    known = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    assert set(re.findall(r"^\*(--[\w-]+)\*", told, re.MULTILINE)) == known


def test_each_unit_is_in_cpr_agent_7() -> None:
    told = page("cpr-agent.7").partition("# UNITS")[2].partition("\n# ")[0]
    units = {path.name.replace("@.", "@NAME.") for path in (ROOT / "units").iterdir() if path.name.startswith("cpr-")}
    units = {name for name in units if name.endswith((".service", ".timer", ".path", ".socket", ".target", ".slice"))}
    heads = set(re.findall(r"\*(cpr-[\w@:.-]+)\*", "\n".join(entries(told))))
    assert {name.replace(":b", "") for name in heads} == units


def test_each_polkit_action_is_in_cpr_agent_7() -> None:
    told = page("cpr-agent.7").partition("# RIGHTS")[2].partition("\n# ")[0]
    policy = ElementTree.parse(ROOT / "policies/org.cpragent1.policy")  # noqa: S314 - our own file
    actions = {str(action.get("id")) for action in policy.iter("action")}
    assert set(re.findall(r"^\*(org\.cpragent1\.[\w-]+)\*$", told, re.MULTILINE)) == actions


def test_each_member_of_the_contract_is_in_its_page() -> None:
    contract = ROOT / "agent/cpr_agent/bus/org.cpragent1.xml"
    made = interface_page()
    for interface in ElementTree.parse(contract).getroot().iter("interface"):  # noqa: S314 - our own file
        part = made.partition(f"# INTERFACE {interface.get('name')}\n")[2].partition("\n# ")[0]
        for member in (m for m in interface if m.tag in ("method", "signal", "property")):
            assert re.search(rf"^\*{member.get('name')}\*", part, re.MULTILINE), member.get("name")


def test_each_option_that_a_method_takes_is_in_its_page() -> None:
    """The names stand in bus/objects.py, where they are checked."""
    source = (ROOT / "agent/cpr_agent/bus/objects.py").read_text()
    tables = re.findall(r"take_options\(\w+, \{(.*?)\}\)|^_UPGRADE_OPTIONS = \{(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    names = {name for table in tables for part in table for name in re.findall(r'"([a-z][\w-]+)"', part)}
    assert len(names) > 10
    told = interface_page()
    assert {name for name in names if f'"{name}"' not in told} == set()


def test_each_code_of_a_finding_is_in_its_page() -> None:
    """And no other. Codes are literals where findings are made."""
    sources = [path.read_text() for path in (ROOT / "agent/cpr_agent").rglob("*.py")]
    forms = [
        r'\bcode ?= ?"([a-z-]+)"',
        r'\b_(?:error|warning)\(\s*"([a-z-]+)"',
        r'\b_lacks\([^"]*"([a-z-]+)"',
        r'\b_finding\(cost, "([a-z-]+)"',
    ]
    codes = {code for text in sources for form in forms for code in re.findall(form, text)} - {"error"}
    constants = (ROOT / "agent/cpr_agent/core/separation.py").read_text()
    codes |= {"memory-survives", *re.findall(r'"([a-z]+-(?:user|device|image))"', constants)}
    assert len(codes) > 50
    check = interface_page().partition("*Check*(a{sv} _options_)")[2].partition("Action:")[0].partition("The codes are")[2]
    told = {
        code
        for head in re.findall(r'^\s*- (("[\w-]+"(?:, )?)+):', check, re.MULTILINE)
        for code in re.findall(r'"([\w-]+)"', head[0])
    }
    assert told == codes


def interface_page() -> str:
    command = [PAGES / "interface", ROOT / "agent/cpr_agent/bus/org.cpragent1.xml", ROOT / "docs/operations.md"]
    made = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.parametrize("name", [path.stem for path in sorted(PAGES.glob("*.scd"))] + ["org.cpragent1.5"])
def test_groff_has_nothing_to_warn_of(name: str) -> None:
    text = interface_page() if name == "org.cpragent1.5" else (PAGES / f"{name}.scd").read_text()
    roff = subprocess.run(["scdoc"], input=text, check=True, capture_output=True, text=True).stdout
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", "-"],
        input=roff,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
    )
    assert shown.stderr == ""


def test_pages_that_are_referred_to_are_there() -> None:
    ours = {path.stem for path in PAGES.glob("*.scd")} | {"org.cpragent1.5"}
    texts = {path.name: path.read_text() for path in (*PAGES.glob("*.scd"), *(ROOT / "units").iterdir())}
    for name, text in {**texts, "interface": interface_page()}.items():
        for title, section in re.findall(r"\b((?:cpr|org\.cpr)[\w.-]*)\*?\((\d)\)", text):
            assert f"{title}.{section}" in ours, f"{name}: {title}({section})"

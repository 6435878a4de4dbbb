# SPDX-License-Identifier: GPL-2.0-or-later
"""Examples in the documents are read by what they are for."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cpr_agent.bus.contract import read_contract
from cpr_agent.cli.main import cli
from cpr_agent.core.settings import Settings
from cpr_agent.vm.definition import decode_toml, read_definition

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packaging/man/*"), *ROOT.glob("packaging/*/*.md")]
)
MEMORY = '\n[memory]\nsize = "4G"\ndevice = "/dev/dax0.0"\n'


def blocks(text: str) -> Iterator[str]:
    """Code in fences, and code that is indented by four."""
    yield from re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", outside, re.MULTILINE):
        yield re.sub(r"^    ", "", block, flags=re.MULTILINE)


def toml_examples() -> list[tuple[str, str]]:
    found = [(path.name, block) for path in DOCUMENTS for block in blocks(path.read_text()) if re.match(r"\s*\[", block)]
    files = [ROOT / "packaging/agent.toml", ROOT / "agent/cpr_agent/cli/example-vm.toml"]
    return found + [(path.name, path.read_text()) for path in files]


def test_there_are_examples() -> None:
    assert len(toml_examples()) >= 6
    assert len(list(cprctl_examples())) > 40
    assert len(list(busctl_examples())) > 15


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in toml_examples()])
def test_an_example_in_toml_can_be_used(text: str, tmp_path: Path) -> None:
    path = tmp_path / "web1.toml"
    path.write_text(text)
    tables = tomllib.loads(text)
    if set(tables) & {"vm", "memory", "save", "load"}:
        path.write_text(text if "memory" in tables else text + MEMORY)
        if "vm" not in tables:
            path.write_text("[vm]\n" + path.read_text())
        read_definition(path)
    else:
        decode_toml(path, Settings)


def test_what_agent_toml_has_in_comments_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    text = (ROOT / "packaging/agent.toml").read_text()
    path.write_text(re.sub(r"^# (?=[\w-]+ = )", "", text, flags=re.MULTILINE))
    assert path.read_text() != text
    assert decode_toml(path, Settings) == Settings()


def lines_with(program: str) -> Iterator[tuple[str, str]]:
    """Each use of ``program`` in code: in a block, between backticks, or in a man page's example."""
    for path in DOCUMENTS:
        text = path.read_text()
        code = [line for block in blocks(text) for line in block.splitlines()]
        code += re.findall(r"`(cprctl [^`]*)`", text.replace("\n", " "))
        for line in code:
            if re.match(rf"\s*{program} ", line):
                yield path.name, line.partition(" #")[0].partition(">")[0].strip()


def cprctl_examples() -> Iterator[tuple[str, list[str]]]:
    for name, line in lines_with("cprctl"):
        if "(" not in line and "…" not in line:
            yield name, shlex.split(line)[1:]


def test_cprctl_has_what_examples_use() -> None:
    for name, words in cprctl_examples():
        command: click.Command = cli
        rest = list(words)
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            word = rest.pop(0).rstrip(",")
            assert word in command.commands, f"{name}: cprctl {' '.join(words)}"
            command = command.commands[word]
        known = {flag for parameter in (*command.params, *cli.params) for flag in parameter.opts} | {"--help"}
        used = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[]").startswith("--")}
        assert used <= known, f"{name}: cprctl {' '.join(words)}"


def busctl_examples() -> Iterator[tuple[str, list[str]]]:
    for name, line in lines_with("busctl"):
        words = [word for word in shlex.split(line)[1:] if not word.startswith("--")]
        if words[1] == "org.cpragent1" and words[0] in ("call", "get-property"):
            yield name, words


def test_the_contract_has_what_examples_with_busctl_use() -> None:
    contract = read_contract()
    for name, (verb, _, _, interface, member, *rest) in busctl_examples():
        if verb == "get-property":
            assert member in contract[interface].properties, f"{name}: {member}"
        else:
            method = contract[interface].methods[member]
            assert (rest[0] if rest else "") == method.in_signature, f"{name}: {interface}.{member}"

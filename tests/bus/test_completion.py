# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion in real shells, with a real agent, and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import ROOT, Lab, until
from tests.terminal import Terminal

COMPLETIONS = ROOT / "packaging/completions"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NO_BUS = "unix:path=/nonexistent/bus"


def shell(kind: str, directory: Path, address: str) -> Terminal:
    """An interactive one that has read the completion from where the package puts it, or from a file of ours."""
    if kind == "bash":
        (directory / "rc").write_text(f"PS1=ready:\nbind 'set enable-bracketed-paste off'\n. {COMPLETIONS}/cprctl.bash\n")
        command = f"bash --noprofile --rcfile {directory}/rc -i"
    else:
        (directory / ".zshrc").write_text(
            f"PS1=ready:\nfpath=({COMPLETIONS} $fpath)\nautoload -U compinit\ncompinit -u -d {directory}/dump\n"
            "zstyle ':completion:*' menu no\nunsetopt zle_bracketed_paste beep\n"
        )
        command = "zsh -i"
    terminal = Terminal(directory, command, PATH=PATH, CPR_AGENT_BUS_ADDRESS=address, ZDOTDIR=str(directory))
    terminal.until_shows("ready:")
    return terminal


@pytest.mark.parametrize("kind", ["bash", "zsh"])
def test_a_shell_completes_commands_options_and_vms(lab: Lab, tmp_path: Path, kind: str) -> None:
    lab.guest("frontend1")
    terminal = shell(kind, tmp_path, lab.address)
    for typed, completed in (
        ("cprctl dev", "devices"),
        ("cprctl status fro", "frontend1"),
        ("cprctl save --surv", "--survives"),
        ("cprctl save --survives qemu", "qemu-restart"),
        ("cprctl memory allo", "allocate"),
        ("cprctl -H root@host2 histo", "history"),
    ):
        terminal.type(f"{typed}\t")
        whole = f"{typed.rpartition(' ')[0]} {completed}"
        until(lambda whole=whole: whole in terminal.shown.replace("\b", ""), f"{whole}, not {terminal.shown[-200:]!r}")  # type: ignore[misc]
        terminal.type("\x15")  # Ctrl-U
    terminal.type("exit\n")
    terminal.ended()


@pytest.mark.parametrize("kind", ["bash", "zsh"])
def test_a_shell_without_an_agent_shows_no_error(tmp_path: Path, kind: str) -> None:
    terminal = shell(kind, tmp_path, NO_BUS)
    terminal.type("cprctl status fro\t")
    terminal.type("\x15echo marker\n")
    terminal.until_shows("\nmarker")
    assert "cprctl:" not in terminal.shown
    assert "Traceback" not in terminal.shown
    terminal.type("exit\n")
    terminal.ended()


def fish(line: str, address: str) -> tuple[list[str], str]:
    """What fish offers for ``line``, each without its description; and what it said on stderr."""
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"source {COMPLETIONS}/cprctl.fish; complete -C '{line}'"],
        env={**os.environ, "PATH": PATH, "CPR_AGENT_BUS_ADDRESS": address},
        capture_output=True,
        text=True,
        check=True,
    )
    return [offer.partition("\t")[0] for offer in ended.stdout.splitlines()], ended.stderr


def test_fish_completes_commands_options_and_vms(lab: Lab) -> None:
    lab.guest("frontend1")
    lab.guest("frontend2")
    for line, offers in (
        ("cprctl dev", ["devices"]),
        ("cprctl status ", ["frontend1", "frontend2"]),
        ("cprctl save --surv", ["--survives"]),
        ("cprctl memory allo", ["allocate"]),
        ("cprctl -H root@host2 histo", ["history"]),
        ("cprctl -H root@host2 status ", []),
    ):
        assert fish(line, lab.address) == (offers, ""), line
    assert fish("cprctl status ", NO_BUS) == ([], "")


VIRSH = """#!/bin/sh
[ "$*" = "--quiet --readonly --connect qemu:///system list --all --name" ] && printf 'web1\\nweb2\\nold\\n\\n'
"""


def test_domains_are_completed_by_virsh(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    virsh = tmp_path / "virsh"
    virsh.write_text(VIRSH)
    virsh.chmod(0o755)
    monkeypatch.setitem(globals(), "PATH", f"{tmp_path}:{PATH}")
    assert fish("cprctl adopt we", lab.address) == (["web1", "web2"], "")
    assert fish("cprctl -H root@host2 adopt we", lab.address) == ([], "")
    virsh.write_text("#!/bin/sh\necho no daemon >&2; exit 1\n")
    assert fish("cprctl adopt we", lab.address) == ([], "")

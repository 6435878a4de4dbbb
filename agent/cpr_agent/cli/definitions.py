# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about VM definitions: edit, read again, and take over from elsewhere.

The agent alone knows what a definition may hold (ADR 10). cprctl writes the files, with the rights of its caller.
"""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

import click

from cpr_agent.bus.client import CallError, Client, options, plain
from cpr_agent.cli.completion import vm_argument
from cpr_agent.cli.session import EXIT_FAILED, Output, Work, command, complain, require_this_host
from cpr_agent.cli.terminal import wrapped
from cpr_agent.files import write_atomically

NEW_MODE = 0o644


@command()
def reload() -> Work:
    """Read the definitions again. Exits 1 if one can't be used."""

    async def work(client: Client, output: Output) -> int:
        problems = await _reload(client)
        output.show([{"vm": vm, "problem": problem} for vm, problem in problems.items()], lambda _: None)
        return EXIT_FAILED if problems else 0

    return work


async def _reload(client: Client) -> dict[str, str]:
    """By VM the problem of each definition that can't be used; they are printed as well."""
    problems = dict(await client.manager("Reload"))
    for problem in problems.values():
        complain(problem)
    return problems


@command()
@vm_argument
def edit(vm: str) -> Work:
    """Edit a VM's definition with $VISUAL or $EDITOR; a new VM begins as a commented example.

    The agent checks the text before it takes the file's place, and then reads it. On this host only.
    """
    require_this_host("edit")
    if not (sys.stdin.isatty() or _editor()):
        raise click.UsageError("no editor can be used here: write the definition's file, and `cprctl reload`")

    async def work(client: Client, output: Output) -> int:
        path = await _definition_path(client, vm)
        before = path.read_bytes() if path.exists() else None
        text = before.decode() if before is not None else files("cpr_agent.cli").joinpath("example-vm.toml").read_text()
        with tempfile.TemporaryDirectory(prefix="cprctl-") as directory:
            copy = Path(directory) / path.name
            copy.write_text(text)
            problem = await _edited(client, vm, copy, text)
            if problem == "" and (path.read_bytes() if path.exists() else None) != before:
                problem = f"somebody else has changed {path} in the meantime"
            if problem:
                return _rescued(output, path, copy, problem)
            if problem is None:
                left = f"{path} was left as it is" if before is not None else f"there is no {path} still"
                return output.error("NothingToDo", f"nothing to do: {left}", vm=vm)
            _replace(path, copy.read_bytes())
        if vm in await _reload(client):
            return EXIT_FAILED
        state = (await client.vm_properties(vm))["State"]
        later = "" if state == "stopped" else f"; VM {vm} is {state}, and takes it from its next start on"
        output.show({"vm": vm, "file": str(path)}, lambda _: click.echo(wrapped(f"{path} was written{later}")))
        return 0

    return work


async def _edited(client: Client, vm: str, copy: Path, text: str) -> str | None:
    """Edit ``copy`` until the agent accepts it or the user gives up; returns the problem that is left, "" for none. None if
    nothing was changed."""
    while True:
        problem = _run_editor(copy)
        if not problem and copy.read_text(errors="replace") == text:
            return None
        if not problem:
            try:
                await client.manager("Validate", "ss", vm, copy.read_text())
                return ""
            except (CallError, UnicodeDecodeError) as error:
                problem = str(error)
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return problem
        complain(problem)
        if not click.confirm("Edit it again", default=True, err=True):
            return problem


def _editor() -> str:
    """Which the user has chosen; "" for none."""
    return os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""


def _run_editor(path: Path) -> str:
    """The problem, or ""."""
    editor = _editor() or "vi"
    try:
        status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        return f"cannot run the editor {editor!r}: {error}"
    return f"the editor {editor!r} ended with status {status}" if status else ""


def _rescued(output: Output, path: Path, copy: Path, problem: str) -> int:
    """Keep the edited text in a file that outlives us, and report where; returns the exit code."""
    fd, rescued = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".toml")
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(copy.read_bytes())
    text = f"{problem.rstrip('.')}. {path} was left as it is; your text is in {rescued}"
    return output.error("InvalidDefinition", text, vm=path.stem)


def _replace(path: Path, data: bytes) -> None:
    """Atomically; a symbolic link stays one, and the file keeps its mode and owner."""
    path = path.resolve()
    old = path.stat() if path.exists() else None
    owner = (old.st_uid, old.st_gid) if old else None
    write_atomically(path, data, mode=old.st_mode & 0o7777 if old else NEW_MODE, owner=owner)


async def _definition_path(client: Client, vm: str) -> Path:
    """Raises CallError if there can be no VM of that name."""
    if "/" in vm or not vm:
        raise CallError("InvalidArgument", f"{vm!r} is not a VM's name")
    return Path((await client.properties("/org/cpragent1", "Manager"))["DefinitionDirectory"]) / f"{vm}.toml"


@command("import")
@click.option("--pid", type=click.IntRange(min=1), help="Of a QEMU that runs.")
@click.option(
    "--cmdline",
    type=click.File("r", errors="replace"),
    help="A file with a command line, as `virsh domxml-to-native qemu-argv`, `qm showcmd` or ps print it; - is stdin.",
)
@click.option("--name", default="", help="The VM's name (default: from -name).")
@click.option("--device", default="", help="Where its RAM shall be: uuid:…, or a file (default: to be filled in).")
@click.option("--offset", default="", help="Where in the device (default: 0).")
@click.option("--user", default="", help="The user of QEMU (default: the process's, but for root; else one of its own).")
@click.option("--output", "file", type=click.Path(dir_okay=False), help="Write it to this file, which must not exist.")
@click.option("--install", is_flag=True, help="Write it to the agent's definitions, where it must not exist, and reload.")
def import_(*, pid: int | None, cmdline: TextIO | None, file: str | None, install: bool, **wanted: str) -> Work:
    """Turn a QEMU's command line into a definition, and list the differences.

    The definition goes to stdout. The differences go to stderr, and stand in comments at its head. Nothing is started or
    stopped: shut the guest down there before it starts here.
    """
    if file and install:
        raise click.UsageError("give --output or --install, not both")
    if pid is not None or install:
        require_this_host("import with --pid or --install")
    if pid is not None and cmdline is None:
        text = _command_line(pid)
        wanted["user"] = wanted["user"] or _user(pid)
        if not wanted["user"]:
            click.echo(f"changed: user: {_AS_WHOM}", err=True)
    elif cmdline is not None and pid is None:
        text = cmdline.read()
        text = shlex.join(_words(text)) if "\0" in text else text  # a copy of /proc/PID/cmdline
    else:
        raise click.UsageError("give --pid or --cmdline")

    async def work(client: Client, output: Output) -> int:
        found = plain(await client.manager("Import", "sa{sv}", text, options(**wanted)))
        found["notes"] = [dict(zip(("outcome", "argument", "why"), note, strict=True)) for note in found["notes"]]
        for note in found["notes"]:
            click.echo(wrapped(f"{note['argument']}: {note['why']}", f"{note['outcome']}: ", sys.stderr), err=True)
        if install:
            return await _install(client, output, found)
        return _export(output, found, Path(file) if file else None)

    return work


_AS_WHOM = "it runs as root there, or as a user without a name; here the VM gets a user of its own"


async def _install(client: Client, output: Output, found: dict[str, Any]) -> int:
    if found["problem"]:
        return output.error("InvalidDefinition", found["problem"], vm=found["name"])
    path = await _definition_path(client, found["name"])
    if problem := _write_new(path, found["definition"]):
        return output.error("Failed", problem, vm=found["name"])
    await _reload(client)
    output.show({**found, "file": str(path)}, lambda _: click.echo(f"{path} was written{_next_steps(found['name'])}"))
    return 0


def _export(output: Output, found: dict[str, Any], path: Path | None) -> int:
    """To ``path``, or to stdout: also one that can't be used yet."""
    if path and (problem := _write_new(path, found["definition"])):
        return output.error("Failed", problem, vm=found["name"])
    if found["problem"]:
        complain(f"it can't be used as it is: {found['problem']}")
    words = f"{path} was written\n" if path else found["definition"]
    output.show({**found, "file": str(path or "")}, lambda _: click.echo(words, nl=False))
    return 0


def _next_steps(vm: str) -> str:
    return f"""
Next: look at what is said above, and mend it: cprctl edit {vm}
      see what is wrong with it:               cprctl check {vm}
      shut the guest down where it runs now, and start it here: cprctl start {vm}"""


def _command_line(pid: int) -> str:
    """As a shell would take it (proc_pid_cmdline(5)): from the directory that it is in, and by sudo where it is root's."""
    process = Path(f"/proc/{pid}")
    try:
        words = _words(process.joinpath("cmdline").read_bytes().decode(errors="replace"))
        root = process.stat().st_uid == 0
    except OSError as error:
        raise click.ClickException(f"there is no process {pid} to read: {error.strerror}") from None
    command = shlex.join([*(["sudo"] if root else []), *words])
    try:
        directory = process.joinpath("cwd").readlink()
    except OSError:
        return command
    return command if "-daemonize" in words else f"cd {shlex.quote(str(directory))} && {command}"  # that goes to /


def _words(text: str) -> list[str]:
    return text.rstrip("\0").split("\0")


def _user(pid: int) -> str:
    """ "" for root, as whom no QEMU should run, and for a user without a name."""
    uid = Path(f"/proc/{pid}").stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name if uid else ""
    except KeyError:
        return ""


def _write_new(path: Path, text: str) -> str:
    """The problem, or ""."""
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        return f"{path} was not written: {error.strerror}"
    return ""


COMMANDS = (reload, edit, import_)

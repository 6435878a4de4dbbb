"""Commands about VM definitions: write, read again, and take over from elsewhere.

What a definition may say the agent alone knows (ADR 10); the files are written here, by who is allowed to.
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
from cpr_agent.cli.session import EXIT_FAILED, json_option, pass_context, run, show, tell_error
from cpr_agent.files import write_atomically

NEW_MODE = 0o644


@click.command()
@json_option
@pass_context
def reload(context: click.Context, as_json: bool) -> None:
    """Read the definitions again. Exits 1 if one can't be used."""

    async def work(client: Client) -> int:
        problems = [{"vm": vm, "problem": problem} for vm, problem in await client.manager("Reload")]
        show(as_json, problems, lambda _: None)
        for problem in problems:
            click.echo(f"cprctl: {problem['problem']}", err=True)
        return EXIT_FAILED if problems else 0

    run(context, work)


@click.command()
@vm_argument
@json_option
@pass_context
def edit(context: click.Context, vm: str, as_json: bool) -> None:
    """Edit a VM's definition with $VISUAL or $EDITOR; a new VM begins as a commented example.

    The agent checks what you wrote before it takes the file's place, and then reads it. On this host only.
    """
    _local(context, "edit")

    async def work(client: Client) -> int:
        path = await _definition_path(client, vm)
        before = path.read_bytes() if path.exists() else None
        text = before.decode() if before is not None else files("cpr_agent.cli").joinpath("example-vm.toml").read_text()
        with tempfile.TemporaryDirectory(prefix="cprctl-") as directory:
            copy = Path(directory) / path.name
            copy.write_text(text)
            problem = await _edited(client, vm, copy, text)
            if problem == "" and (path.read_bytes() if path.exists() else None) != before:
                problem = f"{path} was changed meanwhile by somebody else"
            if problem:
                return _kept(as_json, path, copy, problem)
            if problem is None:
                return tell_error(as_json, "NothingToDo", f"nothing to do: {path} was left as it is", vm=vm)
            _replace(path, copy.read_bytes())
        return await _reloaded(client, as_json, vm, path)

    run(context, work)


async def _edited(client: Client, vm: str, copy: Path, text: str) -> str | None:
    """Edit ``copy`` until the agent would have it, or nobody wants to go on; returns the problem that is left, "" for none.
    None if nothing was changed."""
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
        click.echo(f"cprctl: {problem}", err=True)
        if not click.confirm("Edit it again", default=True, err=True):
            return problem


def _run_editor(path: Path) -> str:
    """What was wrong, or ""."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        return f"cannot run the editor {editor!r}: {error}"
    return f"the editor {editor!r} ended with status {status}" if status else ""


def _kept(as_json: bool, path: Path, copy: Path, problem: str) -> int:
    """Nobody loses what he has typed."""
    fd, kept = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".toml")
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(copy.read_bytes())
    text = f"{problem.rstrip('.')}. {path} was left as it is; what you wrote is in {kept}"
    return tell_error(as_json, "InvalidDefinition", text, vm=path.stem)


def _replace(path: Path, data: bytes) -> None:
    """Atomically, where it really is, with the mode and owner that it had."""
    path = path.resolve()
    had = path.stat() if path.exists() else None
    owner = (had.st_uid, had.st_gid) if had else None
    write_atomically(path, data, mode=had.st_mode & 0o7777 if had else NEW_MODE, owner=owner)


async def _reloaded(client: Client, as_json: bool, vm: str, path: Path) -> int:
    for name, problem in await client.manager("Reload"):
        click.echo(f"cprctl: {problem}", err=True)
        if name == vm:
            return EXIT_FAILED
    state = (await client.vm_properties(vm))["State"]
    later = "" if state == "stopped" else f"; VM {vm} is {state}, and takes it from its next start on"
    show(as_json, {"vm": vm, "file": str(path)}, lambda _: click.echo(f"{path} was written{later}"))
    return 0


async def _definition_path(client: Client, vm: str) -> Path:
    """Raises CallError if there can be no VM of that name."""
    if "/" in vm or not vm:
        raise CallError("InvalidArgument", f"{vm!r} is not a VM's name")
    return Path((await client.properties("/org/cpragent1", "Manager"))["DefinitionDirectory"]) / f"{vm}.toml"


def _local(context: click.Context, what: str) -> None:
    if context.obj.host:
        raise click.UsageError(f"{what} works on this host only, not with -H")


@click.command("import")
@click.option("--pid", type=click.IntRange(min=1), help="Of a QEMU that runs.")
@click.option(
    "--cmdline",
    type=click.File("r", errors="replace"),
    help="A file with a command line, as `virsh domxml-to-native qemu-argv` prints it; - is stdin.",
)
@click.option("--name", default="", help="The VM's name (default: what -name says).")
@click.option("--device", default="", help="Where its RAM shall be: uuid:…, or a file (default: to be filled in).")
@click.option("--offset", default="", help="Where in the device (default: 0).")
@click.option("--user", default="", help="Who QEMU shall run as (default: with --pid who it runs as; else cpr-vm).")
@click.option("--output", type=click.Path(dir_okay=False), help="Write it to this file, which must not be there.")
@click.option("--install", is_flag=True, help="Write it to the agent's definitions, where it must not be, and reload.")
@json_option
@pass_context
def import_(
    context: click.Context, /, pid: int | None, cmdline: TextIO | None, output: str | None, install: bool, **rest: Any
) -> None:
    """Turn a QEMU's command line into a definition, and say what it could not carry over.

    The definition goes to stdout, with what is not as it was in comments at its head and on stderr. Nothing is started or
    stopped: shut the guest down there before it starts here.
    """
    as_json: bool = rest.pop("as_json")
    if pid is not None and cmdline is None:
        text = _command_line(pid)
    elif cmdline is not None and pid is None:
        text = cmdline.read()
    else:
        raise click.UsageError("give --pid or --cmdline")
    if output and install:
        raise click.UsageError("give --output or --install, not both")
    if pid is not None or install:
        _local(context, "import with --pid or --install")
    wanted = {**rest, "user": rest["user"] or (_user(pid) if pid is not None else "")}

    async def work(client: Client) -> int:
        found = plain(await client.manager("Import", "sa{sv}", text, options(**wanted)))
        path = await _definition_path(client, found["name"]) if install else Path(output) if output else None
        notes = [dict(zip(("outcome", "argument", "why"), note, strict=True)) for note in found.pop("notes")]
        for note in notes:
            click.echo(f"{note['outcome']}: {note['argument']}: {note['why']}", err=True)
        if found["problem"] and install:
            return tell_error(as_json, "InvalidDefinition", found["problem"], vm=found["name"])
        if path and (taken := _write_new(path, found["definition"])):
            return tell_error(as_json, "Failed", taken, vm=found["name"])
        if found["problem"]:
            click.echo(f"cprctl: it can't be used as it is: {found['problem']}", err=True)
        if install and path:
            for _, problem in await client.manager("Reload"):
                click.echo(f"cprctl: {problem}", err=True)
        data = {**found, "notes": notes, "file": str(path or "")}
        show(as_json, data, lambda _: click.echo(f"{path} was written" if path else found["definition"], nl=bool(path)))
        return 0

    run(context, work)


def _command_line(pid: int) -> str:
    """As a shell would take it (proc_pid_cmdline(5))."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError as error:
        raise click.ClickException(f"there is no process {pid} to read: {error.strerror}") from None
    return shlex.join(words)


def _user(pid: int) -> str:
    """ "" for root, as whom no QEMU should run, and for one without a name."""
    uid = Path(f"/proc/{pid}").stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name if uid else ""
    except KeyError:
        return ""


def _write_new(path: Path, text: str) -> str:
    """What stood in the way, or ""."""
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        return f"{path} was not written: {error.strerror}"
    return ""


COMMANDS = (reload, edit, import_)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin's own programs around a save; implements core.ports.Hooks.

They run as root, so only root may be able to change them. They run inside the agent's sandbox (units/cpr-agent.service).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cpr_agent.core.model import HookFailure, HookPhase
from cpr_agent.core.paths import why_swappable
from cpr_agent.host.runner import reap_when_done
from cpr_agent.host.waiting import readable

AT_ONCE = 8
"""So many hooks run at the same time, for all guests together."""
STDERR_BYTES = 4096
"""The part of a hook's stderr that is read."""
_SKIPPED = r"\..*|.*~|.*\.(dpkg-\w+|rpm(new|save|orig)|bak|swp)"
"""Left behind by editors and packages (run-parts(8) and systemd.preset(5) skip such names too)."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class HookDirectory:
    """``root`` has ``check.d``, ``pre-save.d`` and ``post-load.d``."""

    def __init__(self, root: Path, timeout_s: float) -> None:
        self._root = root
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self, phase: HookPhase, vm: str, upgrade: str, facts: Mapping[str, object]) -> list[HookFailure]:
        directory = self._root / f"{phase}.d"
        try:
            hooks = sorted(path for path in directory.iterdir() if not re.fullmatch(_SKIPPED, path.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            return [HookFailure(str(directory), f"can't be read: {error.strerror}")]
        failures = []
        about = {"phase": phase, "vm": vm, "upgrade": upgrade}
        environment = {"PATH": _PATH, "LANG": "C.UTF-8", **{f"CPR_{name.upper()}": text for name, text in about.items()}}
        for hook in hooks:
            if not os.access(hook, os.X_OK) and not hook.is_symlink():
                continue  # turned off, as for run-parts(8)
            why = _unsafe(hook)
            if not why:
                async with self._places:
                    why = await _run(hook, environment, json.dumps({**about, **facts}).encode(), self._timeout_s)
            if why:
                failures.append(HookFailure(str(hook), why))
                if phase == "pre-save":  # the save is refused: later hooks would prepare for nothing
                    break
        return failures


def _unsafe(hook: Path) -> str:
    """Why somebody other than root could decide what runs here; "" if only root can. The directory is checked alone, too:
    with a sticky bit, others could put a link to another of root's programs into it."""
    try:
        why = why_swappable(hook.parent) or why_swappable(hook)
        if not why and not hook.is_file():
            why = f"{hook} is not a regular file"
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
    return f"was not run: {why}" if why else ""


async def _run(hook: Path, environment: dict[str, str], about: bytes, timeout_s: float) -> str:
    """Run it in a process group of its own, which is killed as a whole after ``timeout_s``. Returns the failure, or ""."""
    stdin = os.memfd_create("cpr-hook")
    stderr = _Stderr()
    try:
        os.write(stdin, about)
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            child = subprocess.Popen(  # noqa: ASYNC220 - fork and exec take milliseconds; the wait is on a descriptor
                [hook],
                env=environment,
                cwd="/",
                stdin=stdin,
                stdout=2,  # the agent's own stderr: the journal
                stderr=stderr.write_end,
                start_new_session=True,
            )
        except OSError as error:
            return f"can't be run: {error.strerror}"
        finally:
            stderr.started()
        ended = False
        pidfd = os.pidfd_open(child.pid)
        try:
            ended = await readable(pidfd, timeout_s)
        finally:
            os.close(pidfd)
            if not ended:  # the caller may be cancelled
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                reap_when_done(child)
        if not ended:
            return f"did not end within {timeout_s:g} s, and was killed"
        status = child.wait()
        if status == 0:
            return ""
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        return stderr.first_line() or how
    finally:
        os.close(stdin)
        stderr.close()


class _Stderr:
    """The beginning of a child's stderr. It is read as it comes: the child never waits for a reader, and a grandchild that
    lives on does not delay the end."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._text = b""
        asyncio.get_running_loop().add_reader(self._read_end, self._drain)

    def started(self) -> None:
        os.close(self.write_end)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._read_end, STDERR_BYTES):
                self._text = (self._text + piece)[:STDERR_BYTES]
            asyncio.get_running_loop().remove_reader(self._read_end)

    def first_line(self) -> str:
        self._drain()
        lines = self._text.decode(errors="replace").strip().splitlines()
        return "".join(char for char in lines[0] if char.isprintable()) if lines else ""

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._read_end)
        os.close(self._read_end)

# SPDX-License-Identifier: GPL-2.0-or-later
"""A real cockpit-ws with its real bridge, without systemd, PAM or TLS: a session of this user from the start."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import PATIENCE_S, ROOT, script, until

VERSIONS = {"287": "12", "337": "13"}
"""Cockpit's version to the release of Debian that has it."""
NAME = "cpr-agent"


@dataclass
class Cockpit:
    """One session. ``url`` is the page's, without the shell around it."""

    version: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)


def programs(version: str) -> Path:
    found = subprocess.run(
        ["scripts/cockpit", "path", VERSIONS[version]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.fail(f"no Cockpit {version} here; get it with: scripts/cockpit build {VERSIONS[version]}")
    return Path(found.stdout.strip())


def start_cockpit(version: str, directory: Path, bus: str, dist: Path, user: str = "") -> Cockpit:
    """``dist`` is the page, and ``user`` another one than root. Its manifest looks for a file of the agent; here
    that is DIRECTORY/cpr-agentd."""
    root = programs(version)
    if user:  # who can't read the cache
        root = Path(shutil.copytree(root, directory / "cockpit", symlinks=True))
    page = directory / "share/cockpit" / NAME
    shutil.copytree(dist, page)
    manifest = json.loads((page / "manifest.json").read_text())
    manifest["conditions"] = [{"path-exists": str(directory / "cpr-agentd")}]
    (page / "manifest.json").write_text(json.dumps(manifest))
    (directory / "config").mkdir()
    (directory / "cpr-agentd").touch()
    log = directory / "cockpit.log"
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    become = f"env HOME={directory} setpriv --reuid={user} --regid={user} --clear-groups " if user else ""
    libraries = f"{root}/usr/lib/{platform.machine()}-linux-gnu"
    if version == "287":
        bridge = f"exec {become}env LD_LIBRARY_PATH={libraries} {root}/usr/bin/cockpit-bridge"
        ws = [f"{root}/usr/lib/cockpit/cockpit-ws"]
        more = {"LD_LIBRARY_PATH": libraries}
    else:
        bridge = f"exec {become}env PYTHONPATH={root}/usr/lib/python3/dist-packages /usr/bin/python3 -m cockpit.bridge"
        found = subprocess.run(["scripts/host-vm", "root"], cwd=ROOT, capture_output=True, text=True, check=True)
        theirs = f"{found.stdout.strip()}/usr/lib/{platform.machine()}-linux-gnu"
        ws = [
            f"{theirs}/ld-linux-x86-64.so.2",
            "--library-path",
            f"{libraries}:{theirs}",
            f"{root}/usr/lib/cockpit/cockpit-ws",
        ]
        more = {}
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("DBUS_SESSION_BUS_ADDRESS", "PYTHONPATH")},
        **more,
        "DBUS_SYSTEM_BUS_ADDRESS": bus,
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "XDG_CONFIG_DIRS": str(directory / "config"),
        "XDG_DATA_DIRS": f"{directory / 'share'}:{root}/usr/share",
        "XDG_DATA_HOME": str(directory / "home"),
    }
    session = script(directory / "bridge", f"#!/bin/sh\n{bridge}\n")
    command = [*ws, f"--local-session={session}", "--no-tls", f"--port={port}", "--address=127.0.0.1"]
    listener.close()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    until(answers, "cockpit-ws listens")
    return Cockpit(version, f"http://127.0.0.1:{port}/cockpit/@localhost/{NAME}/index.html", process, log)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that ``cpr-vm@NAME.service`` runs to stop: an orderly shutdown of the guest, unless it is saved.

    python3 -m cpr_agent.vm.shutdown RUN_DIR/NAME TIMEOUT_S

It speaks QMP over a socket of its own, because at this moment the agent may be gone. A saved QEMU (run state
``postmigrate``) is told to quit: its guest continues from the checkpoint. Standard library alone, as the launcher.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

MAX_LINE_CHARS = 1 << 20
SAVED = ("postmigrate", "save-vm")
SUSPENDED = "suspended"
QUIT_AT_ONCE = (*SAVED, "inmigrate", "prelaunch", "shutdown", "paused", "guest-panicked", "internal-error")


def main(arguments: list[str]) -> int:
    path, timeout_s = Path(arguments[1]) / "unit.sock", float(arguments[2])
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            stream = connection.makefile("rw", encoding="utf-8")
            json.loads(stream.readline(MAX_LINE_CHARS))  # the greeting
            _execute(stream, "qmp_capabilities")
            state = _execute(stream, "query-status")["status"]
            if state not in QUIT_AT_ONCE:
                if state == SUSPENDED:
                    _execute(stream, "system_wakeup")
                _execute(stream, "system_powerdown")
            else:
                _execute(stream, "quit")
            while stream.readline(MAX_LINE_CHARS):
                pass
    except (ConnectionResetError, FileNotFoundError):
        pass  # QEMU exits or has exited, which was the aim
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        # A guest that does not heed its power button, too. Systemd goes on with SIGTERM, which makes QEMU exit.
        print(f"{path}: {error}", file=sys.stderr)  # noqa: T201 - stderr is the journal
    return 0


def _execute(stream: Any, command: str) -> Any:
    stream.write(json.dumps({"execute": command}) + "\n")
    stream.flush()
    while True:
        line = stream.readline(MAX_LINE_CHARS)
        if not line:
            raise OSError(f"QEMU closed the connection at {command}")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise TypeError(f"QEMU answered {command} with a {type(reply).__name__}")
        if "return" in reply:
            return reply["return"]
        if "error" in reply:
            raise OSError(f"{command}: {reply['error']!r:.500}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))

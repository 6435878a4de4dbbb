"""Runs a command as a user at a terminal of its own, and types a password where it is asked for one.

python3 terminal.py USER PASSWORD COMMAND…
"""

from __future__ import annotations

import os
import pty
import pwd
import select
import sys

TIMEOUT_S = 120.0


def main(user: str, password: str, *command: str) -> int:
    account = pwd.getpwnam(user)
    child, terminal = pty.fork()
    if child == 0:
        os.initgroups(user, account.pw_gid)
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        os.execvp(command[0], command)  # noqa: S606 - what it is for
    said = b""
    while select.select([terminal], [], [], TIMEOUT_S)[0]:
        try:
            heard = os.read(terminal, 4096)
        except OSError:  # EIO: all who had the terminal are gone
            break
        if not heard:
            break
        said += heard
        if said.rstrip().endswith(b"Password:"):
            os.write(terminal, password.encode() + b"\n")
            said += b"\n"
    sys.stdout.write(said.decode(errors="replace"))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

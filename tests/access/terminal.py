# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a command as a user at a terminal of its own, and types a password where it is asked for one.

python3 terminal.py USER PASSWORD COMMAND…
"""

from __future__ import annotations

import fcntl
import os
import pty
import pwd
import select
import struct
import sys
import termios

TIMEOUT_S = 120.0
TIOCPKT_DATA, TIOCPKT_FLUSHREAD = 0, 1
"""Packets of a pseudo-terminal's master (TIOCPKT(2const)). Who asks for a password forgets what was typed before it turned
echo off: that is told by a flush, and only then it can be typed.
"""


def main(user: str, password: str, *command: str) -> int:
    account = pwd.getpwnam(user)
    child, terminal = pty.fork()
    if child == 0:
        os.initgroups(user, account.pw_gid)
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        os.execvp(command[0], command)  # noqa: S606 - what it is for
    fcntl.ioctl(terminal, termios.TIOCPKT, struct.pack("i", 1))
    said, echo_off = b"", False
    while select.select([terminal], [], [], TIMEOUT_S)[0]:
        try:
            heard = os.read(terminal, 4096)
        except OSError:  # EIO: all who had the terminal are gone
            break
        if not heard:
            break
        if heard[0] == TIOCPKT_DATA:
            said += heard[1:]
        elif heard[0] & TIOCPKT_FLUSHREAD:
            echo_off = True  # may be told before what was written earlier
        if echo_off and said.rstrip().endswith(b"Password:"):
            os.write(terminal, password.encode() + b"\n")
            said += b"\n"
            echo_off = False
    sys.stdout.write(said.decode(errors="replace"))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus that lets everybody look.

    python -m tests.hostile.polkit ADDRESS looking|no

"looking" allows ``inspect``, answers nothing when a password may be typed for anything else, and else says no: the user has
an authentication agent of his own, which never answers. "no" denies everything. Prints "ready", "asked" for each
password that a user should type, and "cancelled" for each question that is taken back.
"""

from __future__ import annotations

import sys
from functools import partial

from dbus_next.message import Message

from tests.bus.fake_polkit import serve_polkit, verdict


def decide(how: str, message: Message, action: str, flags: int) -> Message | bool:
    allowed = how == "looking" and action.endswith(".inspect")
    if flags & 1 and not allowed and how == "looking":
        print("asked", flush=True)
        return True
    return verdict(message, yes=allowed)


if __name__ == "__main__":
    serve_polkit(sys.argv[1], partial(decide, sys.argv[2]))

# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus that lets everybody look.

    python -m tests.hostile.polkit ADDRESS looking|no

"looking" allows ``inspect``, answers nothing when a password may be typed for anything else, and else says no: the user has
an authentication agent of his own, which never answers. "no" denies everything. Prints "ready", "asked" for each
password that a user should type, and "cancelled" for each question that is taken back.
"""

from __future__ import annotations

import sys

from dbus_next.message import Message

from tests.bus.stand_in import serve

NAME = "org.freedesktop.PolicyKit1"


def answer(message: Message, how: str) -> Message | bool:
    if message.member == "CancelCheckAuthorization":
        print("cancelled", flush=True)
        return Message.new_method_return(message)
    if message.member != "CheckAuthorization":
        return False
    _, action, _, flags, _ = message.body
    allowed = how == "looking" and action.endswith(".inspect")
    if flags & 1 and not allowed and how == "looking":
        print("asked", flush=True)
        return True
    return Message.new_method_return(message, "(bba{ss})", [[allowed, False, {}]])


if __name__ == "__main__":
    serve(sys.argv[1], NAME, lambda message: answer(message, sys.argv[2]))

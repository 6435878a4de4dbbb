# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus, where the real one would want a system bus, sessions and rules of this machine.

    python -m tests.bus.fake_polkit ADDRESS yes|no|challenge|error|silence

Prints "ready", and then each action that it is asked about with the flags, and "cancelled" where it is.
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
    print(action, flags, flush=True)
    if how == "silence":
        return True
    if how == "error":
        return Message.new_error(message, f"{NAME}.Error.Failed", "out of order")
    return Message.new_method_return(message, "(bba{ss})", [[how == "yes", how == "challenge", {}]])


if __name__ == "__main__":
    serve(sys.argv[1], NAME, lambda message: answer(message, sys.argv[2]))

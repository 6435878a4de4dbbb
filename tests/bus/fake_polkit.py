# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus, where the real one would want a system bus, sessions and rules of this machine.

    python -m tests.bus.fake_polkit ADDRESS yes|no|challenge|error|silence

Prints "ready", and then each action that it is asked about with the flags, and "cancelled" where it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from dbus_next.message import Message

from tests.bus.stand_in import serve

NAME = "org.freedesktop.PolicyKit1"


def serve_polkit(address: str, decide: Callable[[Message, str, int], Message | bool]) -> None:
    """``decide`` answers a question by its action and flags."""

    def answer(message: Message) -> Message | bool:
        if message.member == "CancelCheckAuthorization":
            print("cancelled", flush=True)
            return Message.new_method_return(message)
        if message.member != "CheckAuthorization":
            return False
        _, action, _, flags, _ = message.body
        return decide(message, action, flags)

    serve(address, NAME, answer)


def verdict(message: Message, *, yes: bool, challenge: bool = False) -> Message:
    return Message.new_method_return(message, "(bba{ss})", [[yes, challenge, {}]])


def decide(how: str, message: Message, action: str, flags: int) -> Message | bool:
    print(action, flags, flush=True)
    if how == "silence":
        return True
    if how == "error":
        return Message.new_error(message, f"{NAME}.Error.Failed", "out of order")
    return verdict(message, yes=how == "yes", challenge=how == "challenge")


if __name__ == "__main__":
    serve_polkit(sys.argv[1], partial(decide, sys.argv[2]))

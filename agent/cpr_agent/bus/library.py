# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus library: dbus-fast where it is installed, dbus-next elsewhere (ADR 28). The only importer of either.

Messages, signatures and the forms in which they go over the wire are the library's; connections are ours (wire.py).
Two private members are in use, and both are wrapped here:

- ``Message._marshall``: there is no other way to a message's bytes than a connection that sends them. The agent has to know
  their number before they are sent, as dbus-daemon hangs up on too many.
- ``_private.unmarshaller.Unmarshaller``: there is no other way from bytes to a message than a connection that reads them.
  The agent has to look at a message's size before anything is made of it.
"""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

OLDEST_FAST = (2, 44)
"""Debian 13's. Older ones (Debian 12 has 1.84) read and write otherwise, and nobody has tried them."""


def _bare(package: str) -> bool:
    """Make ``package`` importable without its __init__, which would import services, proxies, and clients for GLib with its
    binding wherever that is installed: guests wait for the agent's start at boot. Returns whether it is installed."""
    if package not in sys.modules:
        if (spec := find_spec(package)) is None:
            return False
        sys.modules[package] = module_from_spec(spec)
    return True


def _has_fast() -> bool:
    try:
        if not _bare("dbus_fast"):
            return False
        from dbus_fast.__version__ import __version__
    except ImportError:
        return False
    major, minor, *_ = __version__.split(".")
    return (int(major), int(minor)) >= OLDEST_FAST


if TYPE_CHECKING or _has_fast():
    import dbus_fast.errors  # noqa: F401 - first: it imports messages, and they import it
    from dbus_fast._private.unmarshaller import Unmarshaller
    from dbus_fast.constants import ErrorType, MessageFlag, MessageType, NameFlag, RequestNameReply
    from dbus_fast.message import Message
    from dbus_fast.signature import SignatureTree, SignatureType, Variant
else:
    _bare("dbus_next")
    import dbus_next.errors  # noqa: F401 - likewise
    from dbus_next._private.unmarshaller import Unmarshaller
    from dbus_next.constants import ErrorType, MessageFlag, MessageType, NameFlag, RequestNameReply
    from dbus_next.message import Message
    from dbus_next.signature import SignatureTree, SignatureType, Variant

__all__ = [
    "ErrorType",
    "Message",
    "MessageFlag",
    "MessageType",
    "NameFlag",
    "RequestNameReply",
    "SignatureTree",
    "SignatureType",
    "Variant",
    "marshal",
    "name",
    "unmarshal",
]


def name() -> str:
    """Of the library in use: dbus_fast or dbus_next."""
    return Message.__module__.partition(".")[0]


def marshal(message: Message) -> bytearray:
    """``message``, which has a serial, as it goes over the wire. It may be the other library's, which then does the work.
    Raises what the library likes."""
    frame: bytearray = message._marshall(False)  # noqa: FBT003 - without descriptors; dbus-fast takes it by position
    return frame


def unmarshal(frame: bytearray) -> Message | None:
    """The message that ``frame`` is, from its first byte to its last; None if bytes are missing. It raises what the library
    likes. The library does not bound how deep values are nested (dbus-fast before 3), or how long this takes."""
    message: Message | None = Unmarshaller(io.BytesIO(frame)).unmarshall()  # type: ignore[arg-type]  # it reads alone
    return message

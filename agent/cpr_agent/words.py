# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes, lengths of time, moments and counts as people read them."""

from __future__ import annotations

import re
import time

_NOT_IN_XML = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
"""Characters that an XML 1.0 document can't have, also not escaped (section 2.2, "Characters")."""


def printable(text: str) -> str:
    """``text`` fit for a document: names and messages come from outside, and may have any character."""
    return re.sub(_NOT_IN_XML, "\N{REPLACEMENT CHARACTER}", text)


def counted(count: int, what: str) -> str:
    """``1 guest``, ``2 guests``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


_HEADLESS = ("is", "has", "had", "can't", "cannot", "could", "was", "were", "takes", "does", "did", "will", "needs", "may")
"""Verbs with which errors go on behind their subject, as in "VM web1: is stopped"."""
_COMMANDS = ("chmod", "chown", "cprctl", "echo", "setfacl", "systemctl", "virsh")
_SETTING = re.compile(r"[A-Za-z_]+ ?= ?\S")


def sentence(text: str) -> str:
    """``text``, which an error or a finding has as a part of one, as a sentence of its own about "it"."""
    first = text.partition(" ")[0]
    if first in _HEADLESS:
        text = f"It {text}"
    elif first.removesuffix(",").isalpha() and first not in _COMMANDS:
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?", "…")) else f"{text}."


def advice(text: str) -> str:
    """Likewise of a remedy; a command stands behind a colon, and has no full stop that would be copied with it."""
    if text.partition(" ")[0] in _COMMANDS:
        return f"Run: {text}"
    return f"Set: {text}" if _SETTING.match(text) else sentence(text)


def length(seconds: float) -> str:
    """Three digits or so: ``12 ms``, ``4.31 s``, ``42.1 s``, ``1 min 12 s``, ``2 h 03 min``, ``3 d 04 h``."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def size(count: int) -> str:
    """Three digits or so: ``512 MiB``, ``1.5 GiB``, ``290 KiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def exact_size(count: int) -> str:
    """``512M``, in the largest unit that divides it: exact, and as definitions and QEMU have it."""
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


def day(at: float) -> str:
    """An epoch time in the host's own zone, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def moment(at: float) -> str:
    """An epoch time in the host's own zone, with the zone's offset."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))

# SPDX-License-Identifier: GPL-2.0-or-later
"""What AppArmor lets the QEMUs of libvirt's domains open, as far as rules for all domains say it (apparmor.d(5))."""

from __future__ import annotations

import re
from pathlib import Path

ABSTRACTION = "abstractions/libvirt-qemu"
DROP_INS = "abstractions/libvirt-qemu.d"
LOCAL = "local/abstractions/libvirt-qemu"
INCLUDE = f"include if exists <{DROP_INS}>"
_INCLUDE = re.compile(r"^\s*#?include\s+(?:if\s+exists\s+)?<(?P<what>[^>]+)>", re.MULTILINE)
_RULE = re.compile(r'^\s*(?P<kind>deny\s+|owner\s+)?"?(?P<path>/[^"\s]*)"?\s+(?P<may>[a-zA-Z]+)\s*,', re.MULTILINE)
_GLOB = re.compile(r"\*\*|\*|\?|\{|\}|,|\[[^]]*\]|.")
_AS_REGEX = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}


def rules_text(root: Path) -> str:
    """All rules below /etc/apparmor.d that libvirt's abstraction for QEMU includes, itself included; "" without it."""
    return _text(root, ABSTRACTION, set())


def _text(root: Path, name: str, seen: set[str]) -> str:
    path = root / name
    if name in seen:
        return ""
    seen.add(name)
    if path.is_dir():
        return "".join(_text(root, f"{name}/{one.name}", seen) for one in sorted(path.iterdir()))
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    included = (match["what"] for match in _INCLUDE.finditer(text))
    return text + "".join(_text(root, one, seen) for one in included)


def may_write(rules: str, path: str) -> bool:
    """Whether these rules let a QEMU that does not own it open this file for reading and writing."""
    return any(
        {"r", "w"} <= set(match["may"]) and re.fullmatch(_regex(match["path"]), path)
        for match in _RULE.finditer(rules)
        if not match["kind"]
    )


def _regex(glob: str) -> str:
    depth, regex = 0, ""
    for part in _GLOB.findall(glob):
        depth += (part == "{") - (part == "}")
        if part.startswith("["):
            regex += part
        else:
            regex += "|" if part == "," and depth else _AS_REGEX.get(part, re.escape(part))
    return regex

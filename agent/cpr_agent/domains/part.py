# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's part of an adopted domain: what stands in its metadata, and the arguments of QEMU that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import msgspec

from cpr_agent.core.model import RAM_ID, Bytes, LoadSection, SaveSection, Seconds, VmSection
from cpr_agent.domains.names import MONITOR_ID, NAMESPACE, PREFIX, Places
from cpr_agent.domains.tree import Element
from cpr_agent.errors import InvalidDefinition
from cpr_agent.text import printable

PAGE = 4096
VM = f"{{{NAMESPACE}}}vm"
METADATA_TOO = "metadata"
"""Attribute of the element: the domain had no metadata before, and has none again when it is released."""
OWN_ARGUMENTS = (
    ("-object", f"memory-backend-file,id={RAM_ID},"),
    ("-machine", f"memory-backend={RAM_ID}"),
    ("-chardev", f"socket,id={MONITOR_ID},"),
    ("-mon", f"chardev={MONITOR_ID},"),
)
"""How they begin, each an option and its value."""
_MEMORY, _SAVE, _LOAD = (f"{{{NAMESPACE}}}{name}" for name in ("memory", "save", "load"))
_HEAD = ("shutdown_timeout", "checkpoint")
_SAVE_SETTINGS = ("order", "timeout", "when_blocked", "blocked_wait")
"""Fields of SaveSection that a domain's metadata may have: a guest that could have to sleep first can't be adopted."""


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's part of a domain. ``align`` is that of the device, 0 for a file."""

    device: str
    size: Bytes
    offset: Bytes = Bytes(0)
    align: Bytes = Bytes(0)
    save: SaveSection = SaveSection(suspend="never")
    load: LoadSection = LoadSection()
    shutdown_timeout: Seconds = VmSection().shutdown_timeout
    checkpoint: str = ""
    """In the XML of a saved image, the id of the checkpoint that it is the state of."""


def arguments(name: str, adopted: Adopted, places: Places) -> list[str]:
    """Of QEMU. The later ``-machine`` wins: RAM of libvirt's is made, and not used."""
    backend = f"memory-backend-file,id={RAM_ID},mem-path={places.gate(name)},share=on,size={int(adopted.size)}"
    backend += f",align={int(adopted.align)}" if adopted.align else ""
    backend += f",offset={int(adopted.offset)}" if adopted.offset else ""
    return [
        *("-object", backend),
        *("-machine", f"memory-backend={RAM_ID}"),
        *("-chardev", f"socket,id={MONITOR_ID},path={places.monitor(name)},server=off"),
        *("-mon", f"chardev={MONITOR_ID},mode=control"),
    ]


def write(adopted: Adopted, *, metadata_too: bool = False) -> str:
    """Written as libvirt writes metadata. What is the default is left out."""
    memory = {"device": adopted.device, "size": int(adopted.size), "offset": int(adopted.offset)}
    memory |= {"align": int(adopted.align)} if adopted.align else {}
    save = {key: value for key, value in _changed(adopted.save).items() if key != "suspend"}
    sections = {"memory": memory, "save": save, "load": _changed(adopted.load)}
    head: dict[str, object] = {f"xmlns:{PREFIX}": NAMESPACE}
    head |= {METADATA_TOO: "added"} if metadata_too else {}
    if adopted.shutdown_timeout != VmSection().shutdown_timeout:
        head["shutdown-timeout"] = f"{float(adopted.shutdown_timeout):g}s"
    lines = [f"    <{PREFIX}:vm{_attributes(head)}>"]
    lines += [f"      <{PREFIX}:{name}{_attributes(keys)}/>" for name, keys in sections.items() if keys]
    return "\n" + "\n".join([*lines, f"    </{PREFIX}:vm>"])


def _changed(section: SaveSection | LoadSection) -> dict[str, object]:
    """The fields that are not as by default, as attributes."""
    out: dict[str, object] = {}
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        if value != field.default:
            word = f"{value:g}s" if isinstance(value, float) else " ".join(value) if isinstance(value, tuple) else value
            out[field.encode_name.replace("_", "-")] = word
    return out


def _attributes(values: dict[str, object]) -> str:
    return "".join(f" {key}={quoted(str(value))}" for key, value in values.items())


def read(vm: Element) -> Adopted:
    """Raises InvalidDefinition."""
    known = {_MEMORY, _SAVE, _LOAD}
    tags = [one.tag for one in vm]
    if (other := set(tags) - known) or len(tags) != len(set(tags)) or _MEMORY not in tags:
        shown = ", ".join(printable(tag, 100) for tag in sorted(other)) or "not each element once"
        raise InvalidDefinition(f"{PREFIX}:vm in its metadata has {shown}; it takes memory, save and load, each once")
    parts = {one.tag.rpartition("}")[2]: dict(one.attrib) for one in vm}
    load = [one.name for one in msgspec.structs.fields(LoadSection)]
    body: dict[str, object] = {
        **_fields(parts["memory"], ("device", "size", "offset", "align"), "memory"),
        **_fields({key: value for key, value in vm.attrib.items() if key != METADATA_TOO}, _HEAD, "vm"),
        "save": {"suspend": "never", **_fields(parts.get("save", {}), _SAVE_SETTINGS, "save")},
        "load": _fields(parts.get("load", {}), load, "load"),
    }
    try:
        found = msgspec.convert(body, Adopted, strict=False, dec_hook=_value)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidDefinition(f"{PREFIX}:vm in its metadata: {printable(str(error), 300)}") from error
    problem = ""
    if not found.device.startswith(("uuid:", "/")) or not found.device.isprintable():
        problem = f"device {printable(found.device, 100)!r} is neither uuid:… nor an absolute path"
    elif found.offset % PAGE or found.size % PAGE:
        problem = f"size and offset must be multiples of {PAGE} bytes"
    if problem:
        raise InvalidDefinition(f"{PREFIX}:memory in its metadata: {problem}")
    return found


def _fields(values: dict[str, str], known: Sequence[str], where: str) -> dict[str, object]:
    """Attributes by the names of fields; one that is not ``known`` is an error, as in a definition's file. Raises
    InvalidDefinition."""
    keys = {name.replace("_", "-"): name for name in known}
    if unknown := sorted(set(values) - set(keys)):
        raise InvalidDefinition(
            f"{PREFIX}:{where} in its metadata has an unknown attribute {printable(unknown[0], 100)!r}",
            remedy=f"known are: {', '.join(sorted(keys))}",
        )
    return {keys[key]: value.split() if key == "when-blocked" else value for key, value in values.items()}


def _value(kind: type, value: object) -> object:
    """Raises ValueError, NotImplementedError."""
    parse = {Bytes: Bytes.parse, Seconds: Seconds.parse}.get(kind)
    if parse is None:
        raise NotImplementedError(kind)
    return parse(str(value))


def quoted(text: str) -> str:
    """An attribute as libxml2 writes it, in metadata."""
    return '"' + escape(text, {'"': "&quot;"}) + '"'

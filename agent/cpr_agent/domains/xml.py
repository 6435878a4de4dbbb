# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's XML: what it says of a VM, the same with its RAM adopted, and as it was before.

The agent's part is an element ``<cpr:vm>`` in ``<metadata>``, and QEMU's arguments that give the guest its RAM and the
agent a monitor. It is put in and cut out of libvirt's own text, so that everything else stays as libvirt wrote it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from itertools import pairwise
from xml.sax.saxutils import escape

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import RAM_ID, Bytes, Definition, MemoryNode, MemorySection, VmSection
from cpr_agent.domains import part
from cpr_agent.domains.names import MONITOR_ID, PREFIX, QEMU_NAMESPACE, QEMU_PREFIX, Places
from cpr_agent.domains.part import Adopted
from cpr_agent.domains.refusals import Refusal, why_not, why_not_by_hand
from cpr_agent.domains.tree import Edit, Element, Tree, parse
from cpr_agent.errors import InvalidDefinition
from cpr_agent.text import printable, printable_lines

_COMMANDLINE, _ARGUMENT = f"{{{QEMU_NAMESPACE}}}commandline", f"{{{QEMU_NAMESPACE}}}arg"
_UNITS = {"b": 1, "bytes": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_UNITS |= {unit: 1 << 10 * power for power, one in enumerate("KMGT", 1) for unit in (one, f"{one}iB")}
_UNITS |= {"k": 1 << 10}
"""libvirt, docs/formatdomain.rst, "Memory Allocation"."""
_PASSWORD = re.compile(r"""(\bpasswd=)("[^"]*"|'[^']*')""")
_CONTEXT_LINES = 3
_DECLARED = re.compile(rf"""\sxmlns:{QEMU_PREFIX}\s*=\s*("[^"]*"|'[^']*')""")


class Domain(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows of a domain by its XML. ``problem`` is "" or why the agent's part can't be used."""

    name: str
    uuid: str
    description: str
    arch: str
    machine: str
    emulator: str
    memory_bytes: int
    adopted: Adopted | None
    problem: str


def read(text: str, places: Places) -> Domain:
    """Raises InvalidDefinition if it is no domain's XML; what is wrong with the agent's part alone is its ``problem``."""
    tree = _parse(text)
    root = tree.root
    kind = root.find("os/type")
    adopted, problem = None, ""
    try:
        adopted = _adopted(tree, places)
    except InvalidDefinition as error:
        problem = error.text
    return Domain(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        description=printable_lines(root.findtext("title") or root.findtext("description") or "", 1000),
        arch=kind.get("arch", "") if kind is not None else "",
        machine=kind.get("machine", "") if kind is not None else "",
        emulator=root.findtext("devices/emulator", ""),
        memory_bytes=_memory_bytes(root),
        adopted=adopted,
        problem=problem,
    )


def read_domain(name: str, raw: bytes, places: Places) -> Definition:
    """An adopted domain's file, as libvirt keeps it. Raises InvalidDefinition."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidDefinition(f"the domain's XML is not UTF-8: {error}", vm=name) from error
    domain = read(text, places)
    if domain.name != name:
        raise InvalidDefinition(f"the domain's XML is that of {printable(domain.name, 100)!r}", vm=name)
    return definition(domain, text)


def settings(text: str) -> Adopted | None:
    """What the metadata say of the agent's part, whatever became of the rest of it: after a rename, or another size. Raises
    InvalidDefinition if the XML is no domain's."""
    vms = _vms(_parse(text))
    with contextlib.suppress(InvalidDefinition):
        return part.read(vms[0]) if len(vms) == 1 else None
    return None


def is_touched(text: str) -> bool:
    """Whether the agent's part, or a rest of it, is in the XML. Raises InvalidDefinition."""
    tree = _parse(text)
    return bool(_vms(tree) or _own_arguments(tree))


def definition(domain: Domain, text: str) -> Definition:
    """An adopted domain as the definition of a VM. Raises InvalidDefinition."""
    if domain.problem or domain.adopted is None:
        raise InvalidDefinition(
            domain.problem or "is a libvirt domain that was not adopted",
            vm=domain.name,
            remedy=f"`cprctl release {domain.name}` takes the agent's part out, `cprctl adopt {domain.name}` puts it in",
        )
    one = domain.adopted
    return Definition(
        name=domain.name,
        vm=VmSection(description=domain.description, qemu=domain.emulator, shutdown_timeout=one.shutdown_timeout),
        memory=MemorySection(size=one.size, device=one.device, offset=one.offset),
        save=one.save,
        load=one.load,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        owner="libvirt",
    )


def adopt(text: str, adopted: Adopted, places: Places) -> str:
    """The domain's XML with the agent's part, in the place of one that it may have. Raises InvalidDefinition."""
    tree = _parse(release(text))
    root = tree.root
    name = root.findtext("name", "")
    edits = []
    words = "".join(f"\n    <{QEMU_PREFIX}:arg value={_quoted(word)}/>" for word in part.arguments(name, adopted, places))
    commandline = root.find(_COMMANDLINE)
    if commandline is not None and (others := commandline.findall(_ARGUMENT)):
        edits.append(tree.after(others[-1], words))
    elif commandline is not None and len(commandline):
        at = tree.cut(commandline[0]).begin
        edits.append(Edit(at, at, words))
    else:
        whole = f"\n  <{QEMU_PREFIX}:commandline>{words}\n  </{QEMU_PREFIX}:commandline>"
        edits.append(tree.after(root[-1], whole) if commandline is None else tree.cut(commandline, whole))
    if not _DECLARED.search(tree.start_tag(root)):
        at = tree.spans[root].inside - 1
        edits.append(Edit(at, at, f" xmlns:{QEMU_PREFIX}='{QEMU_NAMESPACE}'"))
    metadata = root.find("metadata")
    if metadata is not None and len(metadata):
        edits.append(tree.after(metadata[-1], part.write(adopted)))
    else:
        whole = f"\n  <metadata>{part.write(adopted, metadata_too=metadata is None)}\n  </metadata>"
        head = [one for one in root if one.tag in ("name", "uuid", "genid", "title", "description")]
        edits.append(tree.after(head[-1], whole) if metadata is None else tree.cut(metadata, whole))
    return tree.edited(edits)


def release(text: str) -> str:
    """The domain's XML without the agent's part, all else byte by byte as it is. Raises InvalidDefinition if that part was
    changed by hand in a way that leaves a rest."""
    tree = _parse(text)
    root, vms, own = tree.root, _vms(tree), _own_arguments(tree)
    edits = []
    metadata, commandline = root.find("metadata"), root.find(_COMMANDLINE)
    if metadata is not None and vms and len(metadata) == len(vms):
        edits.append(tree.cut(metadata, "" if vms[0].get(part.METADATA_TOO) else "\n  <metadata/>"))
    else:
        edits += [tree.cut(vm) for vm in vms]
    if commandline is not None and own and len(commandline) == len(own):
        edits.append(tree.cut(commandline))
        if not any(_has_qemus(one) for other in root if other is not commandline for one in other.iter()):
            match = _DECLARED.search(tree.start_tag(root))
            begin = tree.spans[root].begin
            edits += [Edit(begin + match.start(), begin + match.end(), "")] if match else []
    else:
        edits += [tree.cut(one) for one in own]
    released = tree.edited(edits)
    if rest := _rest(_parse(released).root):
        raise InvalidDefinition(
            f"its arguments for QEMU were changed by hand: {printable(rest, 200)}",
            vm=root.findtext("name", ""),
            left="nothing was changed",
            remedy=f"take what names {RAM_ID} or {MONITOR_ID} out of <qemu:commandline>: virsh edit",
        )
    return released


def checkpoint_of(text: str) -> str:
    """The id of the checkpoint that the XML of a saved image carries; "" if it has none. Raises InvalidDefinition."""
    return next((vm.get("checkpoint", "") for vm in _vms(_parse(text))), "")


def with_checkpoint(text: str, checkpoint: str) -> str:
    """The XML with this id in the agent's part; "" takes it away. Raises InvalidDefinition."""
    tree = _parse(text)
    (vm,) = _vms(tree) or (None,)
    if vm is None:
        raise InvalidDefinition("is a libvirt domain that was not adopted", vm=tree.root.findtext("name", ""))
    tag = re.sub(r"""\s+checkpoint\s*=\s*("[^"]*"|'[^']*')""", "", tree.start_tag(vm))
    if checkpoint:
        head = re.match(r"<[^\s/>]+", tag)
        at = head.end() if head else len(tag)
        tag = f"{tag[:at]} checkpoint={part.quoted(checkpoint)}{tag[at:]}"
    span = tree.spans[vm]
    return tree.edited([Edit(span.begin, span.inside, tag)])


def with_memory(was: Adopted | None, memory: MemoryNode, align_bytes: int) -> Adopted:
    """The agent's part with this memory, and the settings that it had."""
    if was is None:
        return Adopted(device=memory.device, size=memory.size, offset=memory.offset, align=Bytes(align_bytes))
    return replace(was, device=memory.device, size=memory.size, offset=memory.offset, align=Bytes(align_bytes))


def reasons(text: str) -> list[Refusal]:
    """Why the domain can't be adopted, as its XML without the agent's part says. Raises InvalidDefinition."""
    root = _parse(text).root
    by_hand = [one.get("value", "") for one in root.iterfind(f"{_COMMANDLINE}/{_ARGUMENT}")]
    return [*why_not(root), *why_not_by_hand(by_hand)]


def diff(before: str, after: str, name: str) -> str:
    """For people: a unified diff, in which passwords don't show."""
    old, new = (_PASSWORD.sub(r"\1'…'", text).splitlines() for text in (before, after))
    found = difflib.unified_diff(old, new, f"{name}.xml", f"{name}.xml", lineterm="", n=_CONTEXT_LINES)
    return "".join(f"{line}\n" for line in found)


def _parse(text: str) -> Tree:
    """Raises InvalidDefinition."""
    tree = parse(text)
    if tree.root.tag != "domain" or not tree.root.findtext("name"):
        raise InvalidDefinition("it is not the XML of a libvirt domain")
    return tree


def _vms(tree: Tree) -> list[Element]:
    return tree.root.findall(f"metadata/{part.VM}")


def _adopted(tree: Tree, places: Places) -> Adopted | None:
    """Raises InvalidDefinition."""
    root, vms = tree.root, _vms(tree)
    name = root.findtext("name", "")
    own = _own_arguments(tree)
    if not vms and not own:
        return None
    if len(vms) != 1:
        raise InvalidDefinition(f"its metadata have {len(vms)} elements {PREFIX}:vm instead of one")
    adopted = part.read(vms[0])
    if [one.get("value", "") for one in own] != part.arguments(name, adopted, places):
        raise InvalidDefinition(
            "its arguments for QEMU are not those of its metadata: it was renamed, or one of them was changed by hand"
        )
    if (size := _memory_bytes(root)) != adopted.size:
        raise InvalidDefinition(f"it has {size} bytes of memory, and {int(adopted.size)} were adopted")
    others = [one.get("value", "") for one in root.iterfind(f"{_COMMANDLINE}/{_ARGUMENT}") if one not in own]
    if found := [*why_not(root), *why_not_by_hand(others)]:
        raise InvalidDefinition("; ".join(f"it {one.cause}" for one in found))
    return adopted


def _own_arguments(tree: Tree) -> list[Element]:
    """Options and their values, as ``arguments`` has them, in the order of the text."""
    out: list[Element] = []
    for option, value in pairwise(tree.root.iterfind(f"{_COMMANDLINE}/{_ARGUMENT}")):
        word, more = option.get("value"), value.get("value", "")
        if any(word == known and more.startswith(start) for known, start in part.OWN_ARGUMENTS):
            out += [option, value]
    return out


def _rest(root: Element) -> str:
    """An argument for QEMU that still names what is the agent's; "" if there is none."""
    values = (one.get("value", "") for one in root.iterfind(f"{_COMMANDLINE}/{_ARGUMENT}"))
    return next((word for word in values if re.search(rf"\b({RAM_ID}|{MONITOR_ID})\b", word)), "")


def _has_qemus(element: Element) -> bool:
    """Whether its name, or that of an attribute, is in QEMU's namespace."""
    return any(name.startswith(f"{{{QEMU_NAMESPACE}}}") for name in (element.tag, *element.keys()))


def _memory_bytes(root: Element) -> int:
    """Raises InvalidDefinition."""
    memory = root.find("memory")
    number = "" if memory is None else (memory.text or "").strip()
    unit = "" if memory is None else memory.get("unit", "KiB")
    if not re.fullmatch(r"\d{1,15}", number, re.ASCII) or unit not in _UNITS:
        raise InvalidDefinition(f"its <memory> is no size: {printable(f'{number} {unit}', 100)}")
    return int(number) * _UNITS[unit]


def _quoted(text: str) -> str:
    """An attribute as libvirt writes it, outside of metadata."""
    return "'" + escape(text, {"'": "&apos;", '"': "&quot;"}) + "'"

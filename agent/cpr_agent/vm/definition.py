# SPDX-License-Identifier: GPL-2.0-or-later
"""VM definitions in TOML: strict, and with errors that name the file, the key and the nearest known key."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import (
    VM_NAME,
    BlockNode,
    Bytes,
    Companion,
    Definition,
    Firmware,
    Imported,
    KeptFile,
    Launch,
    Located,
    Manifest,
    MemorySection,
    Owner,
    Seconds,
)
from cpr_agent.core.model.units import MAX_MEMORY_BYTES
from cpr_agent.core.paths import why_swappable
from cpr_agent.errors import CprError, InvalidArgument, InvalidDefinition
from cpr_agent.text import printable, printable_lines
from cpr_agent.vm.carried import carry
from cpr_agent.vm.cmdline import (
    collisions,
    cpus,
    emptied_logs,
    files_below,
    image_files,
    kept_firmware,
    numa_collisions,
    password_displays,
    plan_load,
    plan_probe,
    plan_start,
    plan_transfer,
    read_at_start,
    tap_devices,
    with_firmware,
)
from cpr_agent.vm.companions import companions, missing
from cpr_agent.vm.networks import forbidden_programs

log = logging.getLogger(__name__)

T = TypeVar("T")
CPUS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*", re.ASCII)
MAX_BYTES = 64 << 10
"""Of a file: a definition with a hundred disks has a tenth of that."""
MAX_DEPTH = 8
"""Of tables and lists in each other, and of parts in a dotted key; a definition needs three."""
MAX_DIGITS = 32
_NO_STRUCTURE = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*"""|'''
    r"""'''(?:[^']|'(?!''))*'''|"""
    r"""'[^'\n]*'|"(?:[^"\\\n]|\\.)*"|#[^\n]*""",
    re.DOTALL,
)
"""Strings and comments of TOML."""
_KEY_OR_NUMBER = re.compile(r"[^\s=,\[\]{}]+")


def _decode(kind: type, value: Any) -> Any:
    if kind is not Bytes and kind is not Seconds:
        raise NotImplementedError(kind)
    if isinstance(value, str):
        return kind.parse(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a {'size' if kind is Bytes else 'duration'}")
    return kind.of(value)


READ = msgspec.json.Decoder(Definition, dec_hook=_decode)
"""As that of store/schema.py."""


def decode_toml(path: Path, into: type[T], raw: bytes | None = None, **extra: object) -> T:
    """Read ``path``, or ``raw`` in its place, as the struct ``into``; keys are written with dashes. Raises
    InvalidDefinition, OSError."""
    raw = read_text_file(path) if raw is None else raw
    try:
        text = raw.decode()
        _refuse_excess(text, path)
        read = tomllib.loads(text)
        _refuse_unshown(read, path)
        tables = _known(read, into, path, "")
        return msgspec.convert({**tables, **extra}, into, dec_hook=_decode)
    except tomllib.TOMLDecodeError as error:
        raise InvalidDefinition(f"{path} is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidDefinition(f"{path} is not UTF-8: {error}") from error
    except msgspec.ValidationError as error:
        raise InvalidDefinition(f"{path}: {str(error).replace('$.', '').replace('_', '-')}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # such as of a number that is none to Python
        raise InvalidDefinition(f"{path} can't be read: {error}") from error


def read_text_file(path: Path) -> bytes:
    """Read a regular file of at most MAX_BYTES, and wait for no FIFO or device. Raises InvalidDefinition, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidDefinition(f"{path} is not a regular file")
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InvalidDefinition(f"{path} has more than {MAX_BYTES >> 10} KiB")
    return raw


def read_admins_file(path: Path) -> bytes:
    """Likewise, where none but root, or the user that the agent is, could have written it: it decides as what QEMU runs, on
    which files. Raises InvalidDefinition, OSError."""
    if why := why_swappable(path):
        raise InvalidDefinition(
            f"{path} was not read: {why}",
            remedy=f"the file and all directories above it must be root's, and nobody else may write to them: "
            f"chown root: {path}; chmod go-w {path}",
        )
    return read_text_file(path)


def _refuse_excess(text: str, path: Path) -> None:
    """Refuse a text for which tomllib would need gigabytes or a deep stack. Raises InvalidDefinition."""
    if unshown := sorted({char for char in text if not char.isprintable() and char not in "\t\n\r"}):
        raise InvalidDefinition(f"{path} contains {', '.join(map(printable, unshown[:5]))}, which no text needs")
    bare = re.sub(r"[ \t]*\.[ \t]*", ".", _NO_STRUCTURE.sub("_", text))
    depth = deepest = 0
    for char in bare:
        depth += (char in "[{") - (char in "]}")
        deepest = max(deepest, depth)
    words = _KEY_OR_NUMBER.findall(bare)
    if deepest > MAX_DEPTH or any(word.count(".") >= MAX_DEPTH for word in words):
        raise InvalidDefinition(f"{path} is nested more than {MAX_DEPTH} deep")
    if any(sum(map(str.isdigit, word)) > MAX_DIGITS for word in words):
        raise InvalidDefinition(f"{path} has a number of more than {MAX_DIGITS} digits")


def _refuse_unshown(value: Any, path: Path) -> None:
    """In any text of the file: TOML writes a NUL as an escape. Raises InvalidDefinition."""
    if isinstance(value, str) and printable_lines(value, len(value)) != value:
        raise InvalidDefinition(f"{path} contains a character that does not show: {printable(value, 100)}")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_unshown(one, path)


def _known(table: dict[str, Any], into: Any, path: Path, prefix: str) -> dict[str, Any]:
    """``table`` with field names for keys; a key that ``into`` does not have is an error."""
    hints = get_type_hints(into)
    fields = [f.name for f in msgspec.structs.fields(into) if f.name not in ("name", "digest", "owner")]
    keys = {name.replace("_", "-"): name for name in fields}
    out = {}
    for key, value in table.items():
        if key not in keys:
            import difflib  # for a mistake only: guests wait for the agent's start

            near = difflib.get_close_matches(key, keys, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known are: {', '.join(sorted(keys))}"
            raise InvalidDefinition(f'{path}: unknown key "{prefix}{key}"', remedy=hint)
        kind = hints[keys[key]]
        if get_origin(kind) is tuple and isinstance(value, list):  # of tables, or of plain values
            of = get_args(kind)[0]
            out[keys[key]] = [_nested(one, of, path, f"{prefix}{key}.") for one in value]
        else:
            out[keys[key]] = _nested(value, kind, path, f"{prefix}{key}.")
    return out


def _nested(value: Any, kind: Any, path: Path, prefix: str) -> Any:
    nested = isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict)
    return _known(value, kind, path, prefix) if nested else value


class DefinitionDirectory:
    """The directory of ``NAME.toml`` files; implements core.ports.Definitions."""

    def __init__(self, root: Path, run_dir: Path, log_dir: Path) -> None:
        self._root = root
        self._run_dir = run_dir
        self._log_dir = log_dir

    def load_all(self) -> tuple[dict[str, Definition], dict[str, Exception]]:
        good: dict[str, Definition] = {}
        bad: dict[str, Exception] = {}
        for path in sorted(self._root.glob("*.toml")):
            if not VM_NAME.fullmatch(path.stem):  # no unit could have this name, and systemd's refusal would end the start
                log.warning("%s is not read: its name is not that of a VM", printable(str(path)))
                continue
            try:
                good[path.stem] = read_definition(path, read_admins_file(path))
            except (CprError, OSError) as error:
                bad[path.stem] = error
            except (
                Exception
            ) as error:  # a file that fails in a way not foreseen here must not keep the others from starting
                log.exception("%s can't be read", path)
                bad[path.stem] = InvalidDefinition(f"{path} can't be read: {printable(repr(error), 200)}", vm=path.stem)
        return good, bad

    @property
    def directory(self) -> str:
        return str(self._root)

    def owner(self, name: str) -> Owner:  # noqa: ARG002 - whichever it is
        return "agent"

    def parse(self, name: str, text: str) -> Definition:
        if not VM_NAME.fullmatch(name):
            raise InvalidDefinition(
                f"{printable(name, 100)!r} is not a VM name", remedy="use letters, digits, '-', '_' and '.'"
            )
        from cpr_agent.vm.apart import read_definition_apart  # likewise

        return read_definition_apart(self._root / f"{name}.toml", text, READ)

    def import_command_line(self, text: str, *, name: str, device: str, offset: str, user: str) -> Imported:
        from cpr_agent.vm.apart import import_apart  # likewise

        return import_apart(text, {"name": name, "device": device, "offset": offset, "user": user})

    def plan_start(self, definition: Definition, located: Sequence[Located]) -> Launch:
        return plan_start(definition, located, self._run_dir, self._log_dir)

    def plan_load(self, manifest: Manifest, located: Sequence[Located]) -> Launch:
        return plan_load(manifest, located, self._log_dir)

    def unshareable(self, launch: Launch) -> list[str]:
        alone = [str(one) for one in self.companions(launch) if not one.shared]
        return [f"the tap device {name}" for name in tap_devices(launch.argv)] + alone

    def companions(self, launch: Launch) -> list[Companion]:
        return companions(launch.base_argv)

    async def missing_companions(self, launch: Launch, timeout_s: float) -> list[Companion]:
        return await missing(self.companions(launch), timeout_s)

    def passwords(self, launch: Launch) -> list[str]:
        return password_displays(launch.base_argv)

    def emptied_logs(self, launch: Launch) -> list[str]:
        return emptied_logs(launch.base_argv)

    def images(self, arguments: Sequence[str]) -> list[str]:
        return image_files(arguments)

    def cpus(self, arguments: Sequence[str]) -> int:
        return cpus(arguments)

    def images_below(self, arguments: Sequence[str]) -> list[str]:
        return files_below(arguments)

    def read_at_start(self, launch: Launch) -> list[str]:
        return read_at_start(launch.base_argv)

    def follows(self, launch: Launch) -> bool:  # noqa: ARG002 - the agent knows its command line alone
        return False

    def carry(self, launch: Launch, was: Sequence[BlockNode], now: Sequence[BlockNode]) -> Launch | None:
        argv = carry(launch.base_argv, was, now)
        return replace(launch, base_argv=argv) if argv else None

    def firmware(self, launch: Launch) -> Firmware:
        return kept_firmware(launch.base_argv)

    def with_firmware(self, launch: Launch, copies: Sequence[KeptFile]) -> Launch:
        return replace(launch, argv=with_firmware(launch.argv, copies)) if copies else launch

    def plan_transfer(self, draft: Manifest, located: Sequence[Located], directory: str) -> Launch:
        return plan_transfer(draft, located, self._log_dir, Path(directory))

    def plan_probe(self, launch: Launch) -> Launch:
        return plan_probe(launch)


def read_definition(path: Path, raw: bytes | None = None) -> Definition:
    """One VM's definition, checked as far as a file can be; ``raw`` stands for the content of ``path``. Raises
    InvalidDefinition."""
    name = path.stem
    if not VM_NAME.fullmatch(name):
        raise InvalidDefinition(f"{path}: {name!r} is not a VM name", remedy="use letters, digits, '-', '_' and '.'")
    raw = read_text_file(path) if raw is None else raw
    definition = decode_toml(path, Definition, raw, name=name, digest=hashlib.sha256(raw).hexdigest())
    _refuse_bad_memory(path, name, definition.memory)
    try:
        found = collisions(definition.vm.arguments)
        found += numa_collisions(definition.vm.arguments) if definition.memory.node else []
    except InvalidArgument as error:
        raise InvalidDefinition(f"{path}: vm.arguments: {error.what}", vm=name) from error
    if found:
        raise InvalidDefinition(
            f"{path}: vm.arguments contain what the agent adds itself, or can't allow: {'; '.join(found)}",
            vm=name,
            remedy="remove them; of the RAM and the name, [memory] and the file's name say the same",
        )
    if programs := forbidden_programs(definition.vm.arguments):
        raise InvalidDefinition(
            f"{path}: vm.arguments have QEMU start programs, which its sandbox forbids: {'; '.join(programs)}",
            vm=name,
            remedy="have the interface made at boot, and say tap,ifname=…,script=no,downscript=no: "
            "/usr/share/doc/cpr-agent/confinement.md",
        )
    return definition


def _refuse_bad_memory(path: Path, name: str, memory: MemorySection) -> None:
    """Raises InvalidDefinition."""
    for one in memory.ranges:
        if (memory.node and (memory.size or memory.device or memory.offset)) or not one.size or not one.device:
            what = "[memory] needs a size and a device; or has a [[memory.node]] for each NUMA node, and these need them"
        elif one.size % 4096 or one.offset % 4096:
            what = "memory.size and memory.offset must be multiples of 4096 bytes"
        elif not one.device.startswith(("uuid:", "/")):
            what = f"memory.device {one.device!r} is neither uuid:… nor an absolute path"
        elif one.cpus and not CPUS.fullmatch(one.cpus):
            what = f"memory.node.cpus {one.cpus!r} is not a list of CPUs such as 0-3,8"
        else:
            continue
        raise InvalidDefinition(f"{path}: {what}", vm=name)
    if sum(one.size for one in memory.ranges) > MAX_MEMORY_BYTES:
        raise InvalidDefinition(f"{path}: the NUMA nodes have more than {MAX_MEMORY_BYTES >> 40}T together", vm=name)

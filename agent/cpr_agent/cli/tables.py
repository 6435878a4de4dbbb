# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables for people."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpr_agent.cli.terminal import of_vm, wrapped
from cpr_agent.core.states import VmState
from cpr_agent.words import counted, day, exact_size, length, moment

WIDE = 1 << 16
HEIGHT = 25
ROOMY = 110
"""Columns from which on tables have more than what matters at once."""
VERY_ROOMY = 140
NARROW = 78
"""Columns below which a list has what matters most alone."""
LONGEST_DEVICE = 28
LEAST, LEAST_NAME, GAP = 20, 11, 2
"""Characters of a column that gives room up for others, and of a VM's name, where there is too little room for all; and
those between two columns."""
STYLES: Mapping[str, str] = {
    VmState.RUNNING: "green",
    VmState.SAVED: "cyan",
    VmState.HELD: "bold red",
    VmState.UNREACHABLE: "red",
    "done": "green",
    "refused": "yellow",
    "rolled-back": "yellow",
    "error": "red",
    "warning": "yellow",
}
"""VMs' states, outcomes of an upgrade, severities of findings."""


_WHOLE = frozenset({"VM", "STATE", "SINCE", "MEMORY", "SURVIVES", "DEVICE", "PAUSE", "QEMU", "OWNER", "DATE", "REPORT"})
"""Columns that give nothing up for others."""


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(what: object) -> None:
    """As wide as the terminal; in a file or a pipe each row is one whole line. No word of a guest or a file is markup."""
    # With a width alone rich takes a terminal that is called "dumb" for one of 80 columns.
    console = Console(width=_width(), height=HEIGHT, markup=False, emoji=False, highlight=False)
    console.print(what, soft_wrap=isinstance(what, str | Text))


_line = Text.assemble


def _short(words: str) -> Text:
    """Text that ends in "…" where the terminal is too narrow; `status VM` and --json have all of it."""
    return Text(words, no_wrap=True, overflow="ellipsis")


def _styled(word: str) -> Text:
    return Text(word, STYLES.get(word, ""))


def vms(data: list[dict[str, Any]]) -> None:
    """What is wrong with each stands in its row, as far as there is room; `status VM` has all of it."""
    if not data:
        _print("No VMs are defined. Definitions go to /etc/cpr-agent/vms/NAME.toml.")
        return
    roomy, problems = _width() >= ROOMY, any(map(wrong, data))
    columns: dict[str, Callable[[dict[str, Any]], str | Text]] = {
        "VM": lambda vm: vm["Name"],
        "STATE": lambda vm: _styled(vm["State"]),
        "SINCE": lambda vm: since(vm["Since"]),
        "MEMORY": lambda vm: exact_size(vm["Memory"].get("size", 0)),
        "SURVIVES": lambda vm: vm["Memory"].get("survives", "?"),
    }
    if roomy and (not problems or _width() >= VERY_ROOMY):
        columns |= {
            "DEVICE": lambda vm: _middle(", ".join(one.get("device", "") for one in _ranges(vm["Memory"])), LONGEST_DEVICE)
        }
    if roomy:
        columns |= {
            "PAUSE": lambda vm: length(vm["LastPause"]) if vm["LastPause"] else "",
            "QEMU": lambda vm: Text(_version(vm["QemuRunning"]), "yellow" if vm["QemuOutdated"] else ""),
        }
    if any(vm["Owner"] != "agent" for vm in data):
        columns["OWNER"] = lambda vm: vm["Owner"]
    if problems:
        columns["PROBLEM"] = lambda vm: Text((wrong if roomy else _in_a_word)(vm), "red", no_wrap=True, overflow="ellipsis")
    if roomy and (not problems or _width() >= VERY_ROOMY) and any(vm["Description"] for vm in data):
        columns["DESCRIPTION"] = lambda vm: _short(vm["Description"])
    if _width() < NARROW:
        columns = {name: cell for name, cell in columns.items() if name in ("VM", "STATE", "PROBLEM")}
    _print(_with_names(list(columns), [[cell(entry) for cell in columns.values()] for entry in data]))


def _in_a_word(vm: dict[str, Any]) -> str:
    """The same where there is no room; `status` has the rest."""
    if word := {"gone": "no definition", "invalid": "bad definition"}.get(vm["DefinitionState"]):
        return word
    if vm["Held"]:
        return str(vm["Held"]["error"])
    if vm["Problem"]:
        return "no answer" if vm["State"] == VmState.UNREACHABLE else "see status"
    return "save blocked" if vm["BlockedReasons"] else ""


def wrong(vm: dict[str, Any]) -> str:
    """What is wrong with a VM, in a few words; "" if nothing is."""
    about = of_vm(vm["Name"], vm["Problem"])
    about = about.partition(f"/{vm['Name']}.toml: ")[2] or about  # its file is told by its name
    said = {
        "gone": "its definition is gone",
        "invalid": f"bad definition: {about}" if about else "bad definition",
    }
    parts = [said[vm["DefinitionState"]]] if vm["DefinitionState"] in said else []
    if vm["Held"]:
        parts.append(f"held: {of_vm(vm['Name'], vm['Held']['reason'])}")
    elif about and vm["DefinitionState"] != "invalid":
        parts.append(about)
    if vm["BlockedReasons"]:
        parts.append(f"can't be saved: {'; '.join(vm['BlockedReasons'])}")
    return "; ".join(parts)


def since(at: float) -> str:
    """Today a time, else a day; "" for a moment that is not known."""
    if not at:
        return ""
    then = time.localtime(at)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d", then)


def _with_names(columns: list[str], rows: list[list[str | Text]]) -> Table:
    """A table in which names of VMs are shortened only where all of them, and something of each column that gives room up
    for others, don't fit."""
    others = 0
    for column, *cells in zip(columns, *rows, strict=True):
        most = max(len(column), *map(len, cells))
        others += 0 if column == "VM" else GAP + (most if column in _WHOLE else min(most, LEAST))
    table = _table(*columns)
    for column in table.columns:
        column.no_wrap = column.header in _WHOLE
    at = columns.index("VM")
    for row in rows:
        row[at] = _middle(str(row[at]), max(LEAST_NAME, _width() - others - GAP))
        table.add_row(*row)
    return table


def _version(words: str) -> str:
    """Without that of its package."""
    return words.partition(" ")[0]


def _middle(words: str, most: int) -> str:
    """Both ends of a long name, which tell it from others."""
    if len(words) <= most or _width() >= WIDE:
        return words
    half = (most - 1) // 2
    return f"{words[: most - 1 - half]}…{words[-half:]}"


def _width() -> int:
    """Of the terminal; in a file or a pipe there is room for all."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def agent(data: dict[str, Any]) -> None:
    newer = [f"newest of its flavour: {version}" for version in data["Kernels"][:1] if version != data["Kernel"]]
    kernel = ", ".join([f"kernel {data['Kernel']}", *newer])
    known, under_way = counted(len(data["VMs"]), "VM"), counted(len(data["Jobs"]), "job")
    _print(wrapped(f"cpr-agent {data['Version']}, {known}, {under_way} under way; {kernel}"))
    for job in data["Jobs"]:
        _print(wrapped(f"{job['Kind']}, {job['Progress']:.0%}, {job['Step']}", f"job {job['Id']}: "))
    vms(data["VMs"])
    if data["LastUpgrade"]:
        last = _upgrade(data["LastUpgrade"])
        _print(_coloured(wrapped(last.plain), data["LastUpgrade"]["phase"]))
    for entry in data["VMs"]:
        if entry["Problem"]:
            _said(entry["Name"], of_vm(entry["Name"], entry["Problem"]), "red")


def _upgrade(data: dict[str, Any]) -> Text:
    """The last upgrade's outcome, in one line."""
    since = moment(data["started-at"])
    to = f" -> {data['kernel-to']}" if data["kernel-to"] else ""
    words = [_line(f"last {data['kind']}, {since}: ", _styled(data["phase"]), f", kernel {data['kernel-from']}{to}")]
    if data["loaded"]:
        loaded = counted(len(data["loaded"]), "guest")
        words.append(Text(f"{loaded} loaded, longest pause {data['longest-pause']:.1f} s"))
    words += [Text(f"started afresh: {vm}", "yellow") for vm in data["cold-started"]]
    words += [Text(data["reason"])] if data["reason"] else []
    words += [Text(failure, "red") for failure in data["failures"]]
    return Text("; ").join(words)


def vm(data: dict[str, Any]) -> None:
    memory, checkpoint = data["Memory"], data["Checkpoint"]
    rows = {
        "State": data["State"]
        + (f" since {moment(data['Since'])}" if data["Since"] else "")
        + (f" (run state {data['RunState']})" if data["RunState"] else ""),
        "Description": data["Description"],
        "Memory": ", ".join(_range(one) for one in _ranges(memory) if one)
        + (f", survives a {memory['survives']}" if "survives" in memory else ""),
        "CPUs": str(data["Cpus"] or ""),
        "QEMU": _qemu(data),
        "Owner": data["Owner"],
        "Unit": data["Unit"],
        "User": data["User"],
        "Admin's QMP": data["AdminSocket"],
        "Blocked by": "; ".join(data["BlockedReasons"]),
        "Definition": _DEFINITIONS.get(data["DefinitionState"], "").format(vm=data["Name"]),
        "Problem": "" if data["Held"] else of_vm(data["Name"], data["Problem"]),
    }
    if data["LastPause"]:
        rows["Last pause"] = length(data["LastPause"])
    if "id" in checkpoint:
        stopped = moment(checkpoint["stopped-at"])
        rows["Checkpoint"] = (
            f"{checkpoint['vmstate']}, {checkpoint['size']} bytes, stopped {stopped} while {checkpoint['run-state']}, "
            f"QEMU {checkpoint['qemu-version']} on kernel {checkpoint['kernel']}"
        )
    elif checkpoint:
        rows["Checkpoint"] = checkpoint["error"]
    _print(Text(data["Name"], "bold"))
    for name, value in rows.items():
        if value:
            _print(_coloured(wrapped(value, f"  {name + ':':<13} "), data["State"] if name == "State" else ""))
    if data["Held"]:
        _held(data["Held"])


_DEFINITIONS = {
    "changed": "changed since its QEMU was started; a fresh start takes it",
    "gone": "gone; the VM is here as long as it runs or is saved",
    "invalid": "can't be used: cprctl edit {vm}",
}


def _qemu(vm: dict[str, Any]) -> str:
    words = [vm["Qemu"], *([vm["QemuRunning"]] if vm["QemuRunning"] else [])]
    words += [f"PID {vm['MainPID']}"] if vm["MainPID"] else []
    if vm["QemuOutdated"]:
        words.append(f"installed is {vm['QemuInstalled'] or 'another one'}: cprctl refresh {vm['Name']}")
    return ", ".join(words)


def _coloured(text: str, word: str) -> Text:
    """``text`` with its first ``word`` in the colour that it has everywhere."""
    out = Text(text)
    if word:
        out.highlight_words([word], STYLES.get(word, ""))
    return out


def _said(name: str, words: str, style: str = "bold") -> None:
    """What is said of a VM, behind its name."""
    text = Text(wrapped(words, f"{name}: "))
    text.stylize(style, 0, len(name))
    _print(text)


def _ranges(memory: dict[str, Any]) -> list[dict[str, Any]]:
    """The VM's range of memory, or one for each NUMA node."""
    return list(memory.get("nodes", [memory]))


def _range(memory: dict[str, Any]) -> str:
    return f"{exact_size(memory.get('size', 0))} of {memory.get('device', '?')} from {exact_size(memory.get('offset', 0))}"


def _held(data: dict[str, Any]) -> None:
    """Since when and why the VM is held, with expected and found values side by side."""
    since = moment(data["at"])
    words = f"since {since} ({data['error']}): left as it is until an admin decides"
    text = Text(wrapped(words, "  Held "))
    text.stylize("bold red", 2, 6)
    _print(text)
    if data["evidence"]:
        table = _table("  PROOF", "EXPECTED", "FOUND")
        for what, expected, found in data["evidence"]:
            table.add_row(f"  {what}", expected, found)
        _print(table)


def saved(data: dict[str, Any]) -> None:
    name, checkpoint = data["Name"], data["Checkpoint"]
    words = f"saved, {checkpoint['size']} bytes in {checkpoint['vmstate']}; its RAM survives a {checkpoint['survives']}"
    _print(wrapped(words, f"{name}: "))


def findings(data: list[dict[str, Any]]) -> None:
    if not data:
        _print("No findings.")
        return
    for entry in data:
        whose, severity = entry["vm"] or "host", entry["severity"]
        head = Text(wrapped(entry["what"], f"{whose} {severity}: "))
        head.stylize("bold", 0, len(whose))
        head.stylize(STYLES.get(severity, ""), len(whose) + 1, len(whose) + 1 + len(severity))
        _print(head)
        for label, text in (("why", entry["why"]), ("remedy", entry["remedy"])):
            if text:
                _print(wrapped(text, f"    {label}: "))


def devices(data: list[dict[str, Any]]) -> None:
    if not data:
        _print(wrapped("No dax device is there: this host has no persistent memory that is set up for guests."))
        _print("See /usr/share/doc/cpr-agent/memory.md.")
        return
    table = _table("NODE", "UUID", "OFFSET", "SIZE", "VM")
    table.columns[1].no_wrap = True  # admins copy it to definitions
    for entry in data:
        ranges = [*entry["used"], *([offset, length, ""] for offset, length in entry["free"])]
        rows: list[tuple[str | Text, ...]] = [
            (exact_size(offset), exact_size(length), vm or Text("free", "dim")) for offset, length, vm in sorted(ranges)
        ]
        room = sum(length for _, length in entry["free"])
        rows.append((Text("total", "bold"), Text(exact_size(entry["size"]), "bold"), f"{exact_size(room)} free"))
        # Below the uuid instead of in columns of their own, so that a row fits in 80 columns.
        numa = f"NUMA node {entry['numa-node']}, " if entry["numa-node"] >= 0 else ""
        more = Text(f"{entry['provider']}, {numa}aligned to {exact_size(entry['align'])}", "dim")
        if entry["mode"] != "devdax":
            more = Text.assemble((f"{entry['mode']}: not for guests, ", "bold"), more)
        about = [(entry["node"], entry["uuid"]), ("", more)]
        for left, right in zip_longest(about, rows, fillvalue=("", "")):
            table.add_row(*left, *right)
    _print(table)


def memory(data: dict[str, Any]) -> None:
    """The section of a definition."""
    for line in ("[memory]", *(f'{key} = "{value}"' for key, value in _section(data).items())):
        _print(line)


def _section(data: dict[str, Any]) -> dict[str, str]:
    return {"size": exact_size(data["size"]), "device": data["device"], "offset": exact_size(data["offset"])}


def history(data: list[dict[str, Any]]) -> None:
    """A row a load; in wide terminals with its phases. `report` shows one in full."""
    if not data:
        _print("No load is on record.")
        return
    roomy, rows = _width() >= ROOMY, []
    for entry in data:
        before, after = entry["kernel-before"], entry["kernel-after"]
        cells: list[str | Text] = [
            day(entry["stopped-at"]),
            entry["vm"],
            length(entry["pause"]),
            _short(after if before == after else f"{before} -> {after}" if roomy else f"-> {after}"),
            (entry["upgrade"] or entry["id"])[:8],
        ]
        if roomy:
            said = [f"{name} {length(length_s)}" for name, length_s in entry["phases"]]
            said += [f"clock set, {length(entry['clock-behind'])} behind"] if "clock-behind" in entry else []
            cells.append(_short(", ".join(said)))
        rows.append(cells)
    table = _with_names(["DATE", "VM", "PAUSE", "KERNEL", "REPORT", *(["PHASES"] if roomy else [])], rows)
    table.columns[2].justify = "right"
    _print(table)
    for entry in data:
        if entry["clock-problem"]:
            _said(entry["vm"], f"its clock was not set: {entry['clock-problem']}", "yellow")

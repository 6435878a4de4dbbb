# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpr_agent.core.states import VmState
from cpr_agent.words import counted, exact_size, moment

WIDE = 1 << 16
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


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(what: object) -> None:
    """As wide as the terminal; in a file or a pipe each row is one whole line. No word of a guest or a file is markup."""
    console = Console(width=None if sys.stdout.isatty() else WIDE, markup=False, emoji=False, highlight=False)
    console.print(what, soft_wrap=isinstance(what, str | Text))


_line = Text.assemble


def _short(words: str) -> Text:
    """Text that ends in "…" where the terminal is too narrow; `status VM` and --json have all of it."""
    return Text(words, no_wrap=True, overflow="ellipsis")


def _styled(word: str) -> Text:
    return Text(word, STYLES.get(word, ""))


def vms(data: list[dict[str, Any]]) -> None:
    if not data:
        _print("No VMs are defined. Definitions go to /etc/cpr-agent/vms/NAME.toml.")
        return
    table = _table("VM", "STATE", "OWNER", "MEMORY", "DEVICE", "SURVIVES", "DESCRIPTION")
    for entry in data:
        memory = entry["Memory"]
        table.add_row(
            entry["Name"],
            _styled(entry["State"]),
            entry.get("Owner", "agent"),  # an earlier agent has none but its own
            exact_size(memory.get("size", 0)),
            _short(", ".join(one.get("device", "") for one in _ranges(memory))),
            memory.get("survives", "?"),
            _short(entry["Description"]),
        )
    _print(table)


def agent(data: dict[str, Any]) -> None:
    newer = [f"newest of its flavour: {version}" for version in data["Kernels"][:1] if version != data["Kernel"]]
    kernel = ", ".join([f"kernel {data['Kernel']}", *newer])
    known, under_way = counted(len(data["VMs"]), "VM"), counted(len(data["Jobs"]), "job")
    _print(f"cpr-agent {data['Version']}, {known}, {under_way} under way; {kernel}")
    for job in data["Jobs"]:
        _print(f"job {job['Id']}: {job['Kind']}, {job['Progress']:.0%}, {job['Step']}")
    vms(data["VMs"])
    if data["LastUpgrade"]:
        _print(_upgrade(data["LastUpgrade"]))
    for entry in data["VMs"]:
        if entry["Problem"]:
            _print(_line((entry["Name"], "red"), f": {entry['Problem']}"))


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
        "State": _line(_styled(data["State"]), f" (run state {data['RunState']})" if data["RunState"] else ""),
        "Description": data["Description"],
        "Memory": ", ".join(map(_range, _ranges(memory)))
        + (f", survives a {memory['survives']}" if "survives" in memory else ""),
        "QEMU": data["Qemu"] + (f", PID {data['MainPID']}" if data["MainPID"] else ""),
        "Owner": data.get("Owner", ""),  # an earlier agent has none
        "Unit": data["Unit"],
        "User": data.get("User", ""),  # likewise
        "Admin's QMP": data["AdminSocket"],
        "Blocked by": "; ".join(data["BlockedReasons"]),
        "Problem": data["Problem"],
    }
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
            _print(_line(f"  {name + ':':<13} ", value))
    if data["Held"]:
        _held(data["Held"])


def _ranges(memory: dict[str, Any]) -> list[dict[str, Any]]:
    """The VM's range of memory, or one for each NUMA node."""
    return list(memory.get("nodes", [memory]))


def _range(memory: dict[str, Any]) -> str:
    return f"{exact_size(memory.get('size', 0))} of {memory.get('device', '?')} from {exact_size(memory.get('offset', 0))}"


def _held(data: dict[str, Any]) -> None:
    """Since when and why the VM is held, with expected and found values side by side."""
    since = moment(data["at"])
    _print(_line("  ", ("Held", "bold red"), f" since {since} ({data['error']}): left as it is until an admin decides"))
    if data["evidence"]:
        table = _table("  PROOF", "EXPECTED", "FOUND")
        for what, expected, found in data["evidence"]:
            table.add_row(f"  {what}", expected, found)
        _print(table)


def saved(name: str, data: dict[str, Any]) -> None:
    checkpoint = data["Checkpoint"]
    _print(
        f"{name}: saved, {checkpoint['size']} bytes in {checkpoint['vmstate']}; its RAM survives a {checkpoint['survives']}"
    )


def findings(data: list[dict[str, Any]]) -> None:
    if not data:
        _print("No findings.")
        return
    for entry in data:
        _print(_line((entry["vm"] or "host", "bold"), " ", _styled(entry["severity"]), f": {entry['what']}"))
        for label, text in (("why", entry["why"]), ("remedy", entry["remedy"])):
            if text:
                _print(f"    {label}: {text}")


def devices(data: list[dict[str, Any]]) -> None:
    if not data:
        _print("No dax devices are there. Make one with: ndctl create-namespace -f -e NAMESPACE -m devdax -M mem")
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
    if not data:
        _print("No VM was loaded yet.")
        return
    for entry in data:
        table = _table("PHASE", "SECONDS")
        table.columns[1].justify = "right"
        for name, length_s in entry["phases"]:
            table.add_row(name, f"{length_s:.3f}")
        table.add_row(Text("total pause", "bold"), Text(f"{entry['pause']:.3f}", "bold"))
        kernels = f": kernel {entry['kernel-before']} -> {entry['kernel-after']}"
        _print(_line((entry["vm"], "bold"), f"{kernels}; report {(entry['upgrade'] or entry['id'])[:8]}"))
        if "clock-behind" in entry:
            _print(f"its clock was {entry['clock-behind']:.3f} s behind, and was set")
        if entry["clock-problem"]:
            _print(_line(("its clock was not set:", "yellow"), f" {entry['clock-problem']}"))
        _print(table)

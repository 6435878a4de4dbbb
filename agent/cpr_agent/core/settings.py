# SPDX-License-Identifier: GPL-2.0-or-later
"""What agent.toml can set."""

from __future__ import annotations

from typing import Literal

import msgspec

from cpr_agent.core.model import Policy, Seconds


class AgentSection(msgspec.Struct, frozen=True, kw_only=True):
    runner: Literal["auto", "systemd", "process"] = "auto"
    qemu_start_timeout: Seconds = Seconds(120)
    device_timeout: Seconds = Seconds(90)
    load_timeout: Seconds = Seconds(120)


class FilesSection(msgspec.Struct, frozen=True, kw_only=True):
    directories: tuple[str, ...] = ("/var/lib/cpr-agent/exports",)
    kernel_directories: tuple[str, ...] = ("/boot", "/efi", "/usr/lib/modules")


class WitnessSection(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["sampled", "full", "off"] = "sampled"


class UpgradeSection(msgspec.Struct, frozen=True, kw_only=True):
    policy: Policy = Policy.ALL_OR_NOTHING
    standstill: Seconds = Seconds(10)
    """How long the QEMU of one guest may take to write its state, while the guests of others stand still."""
    stop_first: tuple[str, ...] = ()
    """Units of the host that stop before the first guest does, and start again if the upgrade is taken back."""
    stop_first_timeout: Seconds = Seconds(120)
    """How long all of them may take together."""


class HooksSection(msgspec.Struct, frozen=True, kw_only=True):
    timeout: Seconds = Seconds(30)


class ReportSection(msgspec.Struct, frozen=True, kw_only=True):
    metrics: str = "auto"
    """The directory of node_exporter's textfile collector; "auto": its usual place, if that is there; or "off"."""
    motd: bool = True


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    agent: AgentSection = msgspec.field(default_factory=AgentSection)
    files: FilesSection = msgspec.field(default_factory=FilesSection)
    witness: WitnessSection = msgspec.field(default_factory=WitnessSection)
    upgrade: UpgradeSection = msgspec.field(default_factory=UpgradeSection)
    hooks: HooksSection = msgspec.field(default_factory=HooksSection)
    report: ReportSection = msgspec.field(default_factory=ReportSection)

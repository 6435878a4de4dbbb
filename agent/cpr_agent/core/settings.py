"""What agent.toml can set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cpr_agent.core.model import Policy, Seconds


@dataclass(frozen=True, kw_only=True)
class AgentSection:
    runner: Literal["auto", "systemd", "process"] = "auto"
    qemu_start_timeout: Seconds = Seconds(120)
    device_timeout: Seconds = Seconds(90)
    load_timeout: Seconds = Seconds(120)


@dataclass(frozen=True, kw_only=True)
class FilesSection:
    directories: tuple[str, ...] = ("/var/lib/cpr-agent/exports",)
    kernel_directories: tuple[str, ...] = ("/boot", "/usr/lib/modules")


@dataclass(frozen=True, kw_only=True)
class WitnessSection:
    kind: Literal["sampled", "full", "off"] = "sampled"


@dataclass(frozen=True, kw_only=True)
class UpgradeSection:
    policy: Policy = "all-or-nothing"


@dataclass(frozen=True, kw_only=True)
class HooksSection:
    timeout: Seconds = Seconds(30)


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    metrics: str = "auto"
    """The directory of node_exporter's textfile collector; "auto": its usual place, if that is there; or "off"."""
    motd: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    agent: AgentSection = field(default_factory=AgentSection)
    files: FilesSection = field(default_factory=FilesSection)
    witness: WitnessSection = field(default_factory=WitnessSection)
    upgrade: UpgradeSection = field(default_factory=UpgradeSection)
    hooks: HooksSection = field(default_factory=HooksSection)
    report: ReportSection = field(default_factory=ReportSection)

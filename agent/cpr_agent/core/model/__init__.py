# SPDX-License-Identifier: GPL-2.0-or-later
"""The nouns that all layers share: definitions, identities, manifests. Plain frozen data.

They are structs of msgspec: Python takes a hundred times as long to make a dataclass, and at each boot guests would wait
for that.
"""

from cpr_agent.core.model.checkpoint import (
    MANIFEST_SCHEMA,
    CpuFacts,
    DiskIdentity,
    FileDigest,
    Firmware,
    Held,
    KeptFile,
    Launch,
    Manifest,
    QemuFacts,
    SaveTimes,
    Vmstate,
    Witness,
)
from cpr_agent.core.model.companion import Companion
from cpr_agent.core.model.definition import (
    VM_NAME,
    Definition,
    Imported,
    LoadSection,
    MemoryNode,
    MemorySection,
    Note,
    Owner,
    SaveSection,
    VmSection,
)
from cpr_agent.core.model.finding import Finding, HookFailure, HookPhase, Kernel
from cpr_agent.core.model.inventory import BlockNode, Inventory, OpenFile, Part, PluggedDevice, Throttle
from cpr_agent.core.model.memory import RAM_ID, DaxDevice, Located, MemoryIdentity, Ram, overlapping, ram_of, survives
from cpr_agent.core.model.unit import UNIT_NAME, UNIT_NAME_CHARS, BootTimes, Unit, UnitStop
from cpr_agent.core.model.units import Bytes, Seconds
from cpr_agent.core.states import Policy, RunState, Survives, VmState
from cpr_agent.errors import Difference

__all__ = [
    "MANIFEST_SCHEMA",
    "RAM_ID",
    "UNIT_NAME",
    "UNIT_NAME_CHARS",
    "VM_NAME",
    "BlockNode",
    "BootTimes",
    "Bytes",
    "Companion",
    "CpuFacts",
    "DaxDevice",
    "Definition",
    "Difference",
    "DiskIdentity",
    "FileDigest",
    "Finding",
    "Firmware",
    "Held",
    "HookFailure",
    "HookPhase",
    "Imported",
    "Inventory",
    "KeptFile",
    "Kernel",
    "Launch",
    "LoadSection",
    "Located",
    "Manifest",
    "MemoryIdentity",
    "MemoryNode",
    "MemorySection",
    "Note",
    "OpenFile",
    "Owner",
    "Part",
    "PluggedDevice",
    "Policy",
    "QemuFacts",
    "Ram",
    "RunState",
    "SaveSection",
    "SaveTimes",
    "Seconds",
    "Survives",
    "Throttle",
    "Unit",
    "UnitStop",
    "VmSection",
    "VmState",
    "Vmstate",
    "Witness",
    "overlapping",
    "ram_of",
    "survives",
]

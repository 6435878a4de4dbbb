# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands by which the agent asks a QEMU, and the type of each answer.

A QEMU is its guest's, and may answer anything. An answer is bytes until ``Query.read`` has made a value of the right
shape and range of it; every string in that value is printable and bounded (``cpr_agent.text``). Names and shapes are
those of QAPI (qapi/*.json in QEMU's sources); fields that the agent has no use for are left out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from cpr_agent.text import Text, printable, read_text

T = TypeVar("T")

MAX_SIZE = (1 << 63) - 1
"""QAPI's ``size`` has 64 bits; the manifest and D-Bus take sizes that fit in a signed one."""
Number = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
Small = Annotated[int, Meta(ge=0, le=0xFFFF)]
Word = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Scalar = Annotated[str, Meta(max_length=1000)] | int | float | bool | None
"""A device's property. A longer text is none, and would be kept for each of many."""
MAX_LISTED = 4096
"""Of what a guest has of one kind, of each of which something is asked or said; no host comes near."""
Listed = Annotated[list[T], Meta(max_length=MAX_LISTED)]


class UnreadableReplyError(ValueError):
    """An answer of a wrong shape or range."""


class Query(Generic[T]):
    """A command whose answer is of type ``T``."""

    def __init__(self, command: str, answer: Any) -> None:
        self.command = command
        self._answer = answer

    @cached_property
    def _decoder(self) -> msgspec.json.Decoder[T]:
        """Made at the first answer, in the loop's thread, which alone reads answers (store/schema.py has the reason). No
        start of the agent waits for most of them (ADR 27)."""
        return msgspec.json.Decoder(self._answer, dec_hook=read_text)

    def read(self, raw: bytes | msgspec.Raw) -> T:
        """Raises UnreadableReplyError."""
        try:
            return self._decoder.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UnreadableReplyError(printable(str(error), 200)) from error


class ScalarQuery(Query[Scalar]):
    """Of one value, whose type differs; msgspec's hook sees no text that may be a number as well."""

    def read(self, raw: bytes | msgspec.Raw) -> Scalar:
        value = super().read(raw)
        return printable(value) if isinstance(value, str) else value


class Reply(msgspec.Struct, frozen=True, rename="kebab"):
    """The base of all answers."""


# -- QEMU itself ----------------------------------------------------------------------------------------------------------


class VersionTriple(Reply, frozen=True):
    major: Small
    minor: Small
    micro: Small


class Version(Reply, frozen=True):
    qemu: VersionTriple
    package: Text = ""


class Named(Reply, frozen=True):
    """A command, or a machine type."""

    name: Text


class SchemaEntity(Reply, frozen=True):
    """Of SchemaInfo: the values of an enumeration."""

    values: list[Text] = []


VERSION: Query[Version] = Query("query-version", Version)
COMMANDS: Query[list[Named]] = Query("query-commands", list[Named])
MACHINES: Query[list[Named]] = Query("query-machines", list[Named])
SCHEMA: Query[list[SchemaEntity]] = Query("query-qmp-schema", list[SchemaEntity])


# -- the machine ----------------------------------------------------------------------------------------------------------


class Status(Reply, frozen=True):
    status: Text


class Cpu(Reply, frozen=True):
    qom_path: Text


class FeatureWord(Reply, frozen=True):
    """X86CPUFeatureWordInfo."""

    cpuid_input_eax: Word
    cpuid_register: Text
    features: Word
    cpuid_input_ecx: Word = 0


class ModelProperties(Reply, frozen=True):
    props: dict[str, msgspec.Raw] = {}

    @property
    def features(self) -> list[str]:
        """Names of the features that are on."""
        return [printable(name, 200) for name, value in self.props.items() if bytes(value) == b"true"]


class ModelExpansion(Reply, frozen=True):
    model: ModelProperties = ModelProperties()


class TpmOptions(Reply, frozen=True):
    type: Text


class Tpm(Reply, frozen=True):
    id: Text
    model: Text
    options: TpmOptions


class CpuSlot(Reply, frozen=True):
    """HotpluggableCPU. ``qom_path`` is "" where no CPU is plugged."""

    props: dict[str, Number] = {}
    qom_path: Text = ""


class MemoryDeviceInfo(Reply, frozen=True):
    """Of all kinds of MemoryDeviceInfo's ``data``."""

    id: Text = ""
    size: Number = 0


class MemoryDevice(Reply, frozen=True):
    type: Text
    data: MemoryDeviceInfo


class CurrentMachine(Reply, frozen=True):
    wakeup_suspend_support: bool = False


class QomProperty(Reply, frozen=True):
    name: Text
    type: Text


class PciDevice(Reply, frozen=True, rename=None):
    bus: Small
    slot: Small
    function: Small
    qdev_id: Text
    pci_bridge: PciBridge | None = None


class PciBridge(Reply, frozen=True, rename=None):
    devices: list[PciDevice] = []


class PciBus(Reply, frozen=True):
    devices: list[PciDevice]


STATUS: Query[Status] = Query("query-status", Status)
CPUS: Query[list[Cpu]] = Query("query-cpus-fast", Annotated[list[Cpu], Meta(min_length=1, max_length=8192)])
MODEL_EXPANSION: Query[ModelExpansion] = Query("query-cpu-model-expansion", ModelExpansion)
TPMS: Query[list[Tpm]] = Query("query-tpm", Listed[Tpm])
CURRENT_MACHINE: Query[CurrentMachine] = Query("query-current-machine", CurrentMachine)
PCI: Query[list[PciBus]] = Query("query-pci", Listed[PciBus])
CPU_SLOTS: Query[list[CpuSlot]] = Query("query-hotpluggable-cpus", Annotated[list[CpuSlot], Meta(max_length=8192)])
MEMORY_DEVICES: Query[list[MemoryDevice]] = Query(
    "query-memory-devices", Annotated[list[MemoryDevice], Meta(max_length=8192)]
)
QOM_LIST: Query[list[QomProperty]] = Query("qom-list", list[QomProperty])
QOM_TEXT: Query[str] = Query("qom-get", Text)
QOM_TEXTS: Query[list[str]] = Query("qom-get", list[Text])
QOM_FLAG: Query[bool] = Query("qom-get", bool)
QOM_NUMBER: Query[int] = Query("qom-get", Number)
QOM_SCALAR = ScalarQuery("qom-get", Scalar)
QOM_FEATURE_WORDS: Query[list[FeatureWord]] = Query("qom-get", list[FeatureWord])


# -- memory and disks -----------------------------------------------------------------------------------------------------


class MemoryBackend(Reply, frozen=True):
    """Memdev."""

    size: Number
    share: bool = False
    id: Text = ""


class Image(Reply, frozen=True):
    virtual_size: Number = 0


class Bitmap(Reply, frozen=True):
    """BlockDirtyInfo."""

    name: Text = ""
    persistent: bool = False


class BlockNode(Reply, frozen=True):
    """BlockDeviceInfo."""

    drv: Text = ""
    file: Text = ""
    node_name: Text = ""
    ro: bool = False
    image: Image = Image()
    dirty_bitmaps: Listed[Bitmap] = []


class Limits(Reply, frozen=True, rename=None):
    """BlockDeviceInfo too, of which only the throttles."""

    group: Text = ""
    bps: Number = 0
    bps_rd: Number = 0
    bps_wr: Number = 0
    iops: Number = 0
    iops_rd: Number = 0
    iops_wr: Number = 0
    bps_max: Number = 0
    bps_rd_max: Number = 0
    bps_wr_max: Number = 0
    iops_max: Number = 0
    iops_rd_max: Number = 0
    iops_wr_max: Number = 0
    bps_max_length: Number = 0
    bps_rd_max_length: Number = 0
    bps_wr_max_length: Number = 0
    iops_max_length: Number = 0
    iops_rd_max_length: Number = 0
    iops_wr_max_length: Number = 0
    iops_size: Number = 0


class BlockBackend(Reply, frozen=True):
    """BlockInfo. ``qdev`` is the id of the device that has it, or the device's place in QOM."""

    device: Text = ""
    qdev: Text = ""
    inserted: Limits | None = None


class BlockExport(Reply, frozen=True):
    """BlockExportInfo."""

    id: Text
    type: Text = ""
    node_name: Text = ""


class Chardev(Reply, frozen=True):
    """ChardevInfo."""

    label: Text
    filename: Text = ""


class GraphNode(Reply, frozen=True):
    """XDbgBlockGraphNode. ``name`` of a backend is that of its drive, or its device's place in QOM."""

    id: Number
    name: Text
    type: Text


class GraphEdge(Reply, frozen=True):
    """XDbgBlockGraphEdge: ``name`` is the child's role."""

    parent: Number
    child: Number
    name: Text


class BlockGraph(Reply, frozen=True):
    """XDbgBlockGraph. A debugging command, which all of QEMU 4.0 to 11.1 have; nothing else tells the roles before 10.1."""

    nodes: Listed[GraphNode] = []
    edges: Listed[GraphEdge] = []


class BlockJob(Reply, frozen=True):
    """JobInfo."""

    id: Text
    status: Text = ""


MEMORY_BACKENDS: Query[list[MemoryBackend]] = Query("query-memdev", Listed[MemoryBackend])
BLOCK_NODES: Query[list[BlockNode]] = Query("query-named-block-nodes", Listed[BlockNode])
BLOCK_BACKENDS: Query[list[BlockBackend]] = Query("query-block", Listed[BlockBackend])
BLOCK_GRAPH: Query[BlockGraph] = Query("x-debug-query-block-graph", BlockGraph)
BLOCK_EXPORTS: Query[list[BlockExport]] = Query("query-block-exports", Listed[BlockExport])
CHARDEVS: Query[list[Chardev]] = Query("query-chardev", Listed[Chardev])
QOM_LIMITS: Query[dict[str, int]] = Query(
    "qom-get", Annotated[dict[Annotated[str, Meta(max_length=32)], Number], Meta(max_length=32)]
)
"""ThrottleLimits has 19, the longest of 21 characters."""
HUMAN_MONITOR: Query[str] = Query("human-monitor-command", Text)
JOBS: Query[list[BlockJob]] = Query("query-jobs", Listed[BlockJob])


# -- migration ------------------------------------------------------------------------------------------------------------


class Mode(Reply, frozen=True):
    """ReplayInfo, COLOStatus."""

    mode: Text


class Capability(Reply, frozen=True):
    capability: Text
    state: bool


class Parameters(Reply, frozen=True):
    mode: Text | None = None
    """None where QEMU has no modes."""
    tls_creds: Text | None = None


class Migration(Reply, frozen=True):
    """MigrationInfo."""

    status: Text = "none"
    error_desc: Text = ""
    blocked_reasons: Annotated[list[Text], Meta(max_length=256)] = []


class FdSet(Reply, frozen=True):
    """AddfdInfo."""

    fdset_id: Number


REPLAY: Query[Mode] = Query("query-replay", Mode)
COLO: Query[Mode] = Query("query-colo-status", Mode)
CAPABILITIES: Query[list[Capability]] = Query("query-migrate-capabilities", list[Capability])
PARAMETERS: Query[Parameters] = Query("query-migrate-parameters", Parameters)
MIGRATION: Query[Migration] = Query("query-migrate", Migration)
ADD_FD: Query[FdSet] = Query("add-fd", FdSet)


# -- messages ------------------------------------------------------------------------------------------------------------


class Timestamp(Reply, frozen=True):
    """In microseconds because QEMU says so; -1 where it could not tell (docs/interop/qmp-spec)."""

    seconds: Annotated[int, Meta(ge=-1, le=1 << 40)]
    microseconds: Annotated[int, Meta(ge=-1, le=999_999)]

    @property
    def epoch_s(self) -> float:
        return self.seconds + self.microseconds / 1e6


class EventData(Reply, frozen=True):
    """Of MIGRATION; other events that matter have none that does."""

    status: Text = ""


class ErrorInfo(Reply, frozen=True):
    desc: Text


class Envelope(Reply, frozen=True, rename=None):
    """Any message of QEMU: a greeting, an event, an answer, a refusal."""

    id: str | None = None
    event: Text = ""
    timestamp: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    error: ErrorInfo | None = None
    QMP: msgspec.Raw = msgspec.Raw()
    answer: msgspec.Raw = msgspec.field(name="return", default=msgspec.Raw())


MESSAGE: Query[Envelope] = Query("", Envelope)
TIMESTAMP: Query[Timestamp] = Query("", Timestamp)
EVENT_DATA: Query[EventData] = Query("", EventData)

# SPDX-License-Identifier: GPL-2.0-or-later
"""Adopted domains as definitions. They are read from libvirt's own files: no daemon of libvirt's has to be there for
that."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from cpr_agent.core.model import Definition, Firmware, Launch, Located, Manifest, ram_of
from cpr_agent.domains.host import LibvirtPaths, adopted
from cpr_agent.domains.names import NAMESPACE, Places
from cpr_agent.errors import CprError
from cpr_agent.vm.cmdline import keyed

_LIBVIRTS = ("/run/libvirt/", "/var/run/libvirt/", "/var/lib/libvirt/")
"""Where libvirt has the sockets of swtpm, virtiofsd, passt and dbus-daemon."""


class DomainDefinitions:
    """The part of core.ports.Definitions that is another one for domains."""

    def __init__(self, host: LibvirtPaths, places: Places) -> None:
        self._host = host
        self._places = places

    def load_all(self) -> tuple[dict[str, Definition], dict[str, Exception]]:
        from cpr_agent.domains.xml import read_domain  # a host without domains needs no parser

        good: dict[str, Definition] = {}
        bad: dict[str, Exception] = {}
        for name, raw in adopted(self._host.definitions, NAMESPACE.encode()):
            try:
                good[name] = read_domain(name, raw, self._places)
            except CprError as error:
                bad[name] = error
        return good, bad

    def plan_start(self, definition: Definition, located: Sequence[Located]) -> Launch:
        """libvirt makes the command line, which is recorded once its QEMU is there."""
        argv = (definition.vm.qemu,)
        return Launch(
            vm=definition.name,
            kind="start",
            argv=argv,
            base_argv=argv,
            memory=ram_of(located),
            nodes=tuple(one.node for one in located),
            memory_fds=(),
            sockets={},
            log=str(self._host.log(definition.name)),
            user="",
            shutdown_timeout_s=float(definition.vm.shutdown_timeout),
            definition_digest=definition.digest,
        )

    def plan_load(self, manifest: Manifest, located: Sequence[Located]) -> Launch:
        nodes = tuple(one.node for one in located)
        return replace(manifest.launch, kind="load", memory=ram_of(located), nodes=nodes, checkpoint=manifest.id)

    def without_own(self, launch: Launch) -> Launch:
        """``launch`` without the sockets of programs that libvirt starts beside its QEMU, and of the agent's monitor."""
        own = (*_LIBVIRTS, f"{self._places.monitors}/")
        words, left = list(launch.base_argv), []
        while words:
            word = words.pop(0)
            if word == "-chardev" and words and keyed(words[0]).get("path", "").startswith(own):
                del words[0]
            else:
                left.append(word)
        return replace(launch, base_argv=tuple(left))

    def firmware(self, launch: Launch) -> Firmware:  # noqa: ARG002
        """libvirt names the files; no copy can take their place."""
        return Firmware()

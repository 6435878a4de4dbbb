# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions with libvirt's daemon: which are kept, and when a domain may be started. The library is a stand-in, since the
real one needs a daemon; with that one all of this runs in tests/libvirt."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from cpr_agent.domains.connection import IDLE_SESSIONS, Libvirt
from cpr_agent.errors import QemuRefused, QemuUnreachable

PATIENCE_S = 8.0


class LibvirtError(Exception):
    def get_error_code(self) -> int:
        return 0

    def get_error_domain(self) -> int:
        return 0


class Daemon:
    """Its connections, and the one domain web1, which runs."""

    def __init__(self) -> None:
        self.opened = 0
        self.active = True
        self.asked = threading.Event()
        self.created_while_active: list[bool] = []

    def open(self, uri: str) -> Any:
        assert uri == "qemu:///system"
        self.opened += 1
        return SimpleNamespace(
            isAlive=lambda: True,
            close=lambda: None,
            setKeepAlive=lambda *_: None,
            lookupByName=lambda _: SimpleNamespace(isActive=self._is_active, create=self._create),
        )

    def _is_active(self) -> bool:
        self.asked.set()
        return self.active

    def _create(self) -> None:
        self.created_while_active.append(self.active)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    daemon, codes = Daemon(), ("NO_CONNECT", "INVALID_CONN", "RPC", "SYSTEM_ERROR", "OPERATION_TIMEOUT", "NO_DOMAIN")
    module = SimpleNamespace(
        open=daemon.open,
        registerErrorHandler=lambda *_: None,
        virEventRegisterDefaultImpl=lambda: None,
        virEventRunDefaultImpl=threading.Event().wait,
        libvirtError=LibvirtError,
        VIR_FROM_RPC=7,
        **{f"VIR_ERR_{code}": number for number, code in enumerate(codes, 100)},
    )
    monkeypatch.setitem(sys.modules, "libvirt", module)
    return daemon


def test_a_session_serves_one_call_after_another(daemon: Daemon) -> None:
    """Also after one that libvirt has refused."""

    def refuse(_: Any) -> None:
        raise LibvirtError

    async def run() -> None:
        libvirt = Libvirt()
        await libvirt.aside("web1", "done it", lambda _: None)
        with pytest.raises(QemuRefused):
            await libvirt.aside("web1", "done it", refuse)
        await libvirt.aside("web1", "done it", lambda _: None)

    asyncio.run(run())
    assert daemon.opened == 1


def test_calls_at_once_have_a_session_each_and_few_are_kept(daemon: Daemon) -> None:
    many = 2 * IDLE_SESSIONS

    async def run() -> None:
        libvirt, together = Libvirt(), threading.Barrier(many)
        for _ in range(2):
            calls = (libvirt.aside("web1", "done it", lambda _: together.wait(PATIENCE_S)) for _ in range(many))
            await asyncio.gather(*calls)

    asyncio.run(run())
    assert daemon.opened == 2 * many - IDLE_SESSIONS


def test_no_call_waits_behind_one_that_its_caller_has_given_up(daemon: Daemon) -> None:
    async def run() -> None:
        libvirt, hangs = Libvirt(), threading.Event()
        with pytest.raises(QemuUnreachable, match=r"has not done it within 0\.01 s"):
            await libvirt.aside("web1", "done it", lambda _: hangs.wait(PATIENCE_S), 0.01)
        await libvirt.aside("web1", "done it", lambda _: None)
        hangs.set()

    asyncio.run(run())
    assert daemon.opened == 2


def test_a_domain_is_started_once_libvirt_has_noted_the_end_of_its_qemu(daemon: Daemon) -> None:
    async def run() -> None:
        libvirt = Libvirt()

        async def create() -> None:
            await libvirt.until_off("web1")
            await libvirt.create("web1")

        creating = asyncio.create_task(create())
        await asyncio.to_thread(daemon.asked.wait, PATIENCE_S)
        for heard in tuple(libvirt.heard.ended):
            heard("web2")
        await asyncio.sleep(0)
        assert not daemon.created_while_active
        daemon.active = False
        for heard in tuple(libvirt.heard.ended):
            heard("web1")
        await creating
        assert not libvirt.heard.ended, "nobody listens any more"

    asyncio.run(run())
    assert daemon.created_while_active == [False]

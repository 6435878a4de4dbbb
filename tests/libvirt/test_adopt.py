# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt itself makes of an adoption and of a release, and what of its domains can't be adopted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import pytest
from jsonschema import Draft202012Validator

from cpr_agent.cli.session import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_NOTHING, EXIT_REFUSED
from cpr_agent.domains.names import NAMESPACE, QEMU_NAMESPACE
from tests.lab import ROOT
from tests.libvirt.bed import RELEASES
from tests.libvirt.lab import Domain, LibvirtLab

Change = Callable[[str], str]
SCHEMA = json.loads((ROOT / "docs/schema/cprctl.schema.json").read_text())


def put(before: str, more: str) -> Change:
    """More XML before a part of it."""

    def change(text: str) -> str:
        assert before in text
        return text.replace(before, f"{more}{before}", 1)

    return change


def device(more: str) -> Change:
    return put("</devices>", more)


def backing(more: str) -> Change:
    return put("<vcpu", f"<memoryBacking>{more}</memoryBacking>")


def by_hand(*words: str, more: str = "") -> Change:
    arguments = "".join(f"<qemu:arg value='{word}'/>" for word in words)
    return put("</domain>", f"<qemu:commandline xmlns:qemu='{QEMU_NAMESPACE}'>{arguments}{more}</qemu:commandline>")


def metadata(instead: str) -> Change:
    return lambda text: re.sub(r"<metadata>.*</metadata>", lambda _: instead, text, flags=re.DOTALL)


def both(*changes: Change) -> Change:
    def change(text: str) -> str:
        for one in changes:
            text = one(text)
        return text

    return change


NUMA = put("<clock", "<cpu><numa><cell id='0' cpus='0' memory='65536' unit='KiB'/></numa></cpu>")
ENVIRONMENT = "<qemu:env name='X' value='&amp;'/>"
CAPABILITY = f"<qemu:capabilities xmlns:qemu='{QEMU_NAMESPACE}'><qemu:del capability='usb-hub'/></qemu:capabilities>"
NOTE = '<a:note xmlns:a="urn:a" k="&lt;&quot;">text <a:c/> more</a:note>'
WORDS = ("-fw_cfg", "name=opt/x,string=&apos;&quot;&lt;")

DOMAINS: dict[str, Change] = {
    "as virt-install has it": lambda text: text,
    "no metadata": metadata(""),
    "empty metadata": metadata("<metadata/>"),
    "other metadata": metadata(f"<metadata>{NOTE}<b:b xmlns:b='urn:b'/></metadata>"),
    "title and description": put("<metadata>", "<title>a &amp; b</title><description>x\n y &lt;</description>"),
    "arguments by hand": by_hand(*WORDS),
    "environment by hand": by_hand(more=ENVIRONMENT),
    "capability by hand": put("</domain>", CAPABILITY),
    "all by hand": both(by_hand(*WORDS, more=ENVIRONMENT), put("</domain>", CAPABILITY)),
    "password": lambda text: text.replace("<graphics type='vnc'", "<graphics type='vnc' passwd='top&quot;'"),
}
REFUSED: dict[str, Change] = {
    "NUMA cells": NUMA,
    "huge pages": backing("<hugepages/>"),
    "has <source> in": backing("<source type='memfd'/>"),
    "shared RAM": backing("<access mode='shared'/>"),
    "locked RAM": backing("<locked/>"),
    "allocated at once": backing("<allocation mode='immediate'/>"),
    "<maxMemory>": both(NUMA, put("<vcpu", "<maxMemory slots='2' unit='KiB'>262144</maxMemory>")),
    "<hostdev>": device(
        "<hostdev mode='subsystem' type='usb'><source><vendor id='1'/><product id='2'/></source></hostdev>"
    ),
    "virtiofs": both(
        backing("<source type='memfd'/><access mode='shared'/>"),
        device("<filesystem><driver type='virtiofs'/><source dir='/srv'/><target dir='srv'/></filesystem>"),
    ),
    "<filesystem>": device("<filesystem><source dir='/srv'/><target dir='srv'/></filesystem>"),
    "ivshmem": device("<shmem name='x'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"),
    "host's TPM": device("<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"),
    "transient disk": lambda text: text.replace("<target dev='vda'", "<transient/><target dev='vda'"),
    "-incoming": by_hand("-incoming", "defer"),
    "memory-backend=mine": by_hand("-machine", "memory-backend=mine"),
    "rounds up": lambda text: text.replace(">65536<", ">65537<"),
}


def definition(guest: Domain) -> str:
    """With its passwords."""
    return guest.virsh("dumpxml", "--inactive", "--security-info")


def settled(guest: Domain, text: str) -> str:
    """As libvirt writes it in the end: 9.0 writes controllers that it added itself in another order the second time."""
    for _ in range(2):
        guest.define_xml(text)
        text = definition(guest)
    return text


def test_release_gives_back_what_libvirt_would_have_without_us(each_lab: LibvirtLab) -> None:
    guest = each_lab.domain()
    plain = settled(guest, definition(guest))
    for name, change in DOMAINS.items():
        before = settled(guest, change(plain))
        guest.adopt()
        assert NAMESPACE in definition(guest), name
        released = each_lab.cprctl("release", guest.name, "--yes")
        assert released.returncode == 0, (name, released.stderr)
        assert definition(guest) == before, name
    assert each_lab.cprctl("release", guest.name, "--yes").returncode == EXIT_NOTHING


def test_what_can_t_be_adopted_is_refused_with_its_reason(each_lab: LibvirtLab) -> None:
    guest = each_lab.domain()
    plain = settled(guest, definition(guest))
    for reason, change in REFUSED.items():
        before = settled(guest, change(plain))
        refused = each_lab.cprctl("adopt", guest.name, "--yes", f"--device={guest.ram}")
        assert refused.returncode == EXIT_REFUSED, (reason, refused)
        assert reason in refused.stderr
        assert guest.name in refused.stderr
        assert definition(guest) == before, reason


def test_a_state_that_stands_in_the_way_is_named(each_lab: LibvirtLab) -> None:
    def refusal(code: int = EXIT_REFUSED) -> str:
        refused = each_lab.cprctl("adopt", guest.name, "--yes", f"--device={guest.ram}")
        assert refused.returncode == code, refused
        assert NAMESPACE not in definition(guest)
        return refused.stderr

    guest = each_lab.domain()
    guest.virsh("start")
    assert "is running" in refusal()
    guest.virsh("managedsave")
    assert "managed save" in refusal()
    guest.virsh("managedsave-remove")
    guest.virsh("start")
    guest.virsh("snapshot-create-as", "before")
    guest.virsh("destroy")
    assert "snapshots with memory (before)" in refusal()
    guest.virsh("snapshot-delete", "before")
    guest.adopt()


def test_a_transient_domain_is_refused(lab: LibvirtLab) -> None:
    guest = lab.domain()
    guest.virsh("start")
    guest.virsh("undefine")
    refused = lab.cprctl("adopt", guest.name, "--yes", f"--device={guest.ram}")
    assert refused.returncode == EXIT_REFUSED
    assert "is transient" in refused.stderr


def test_an_image_format_that_can_t_leave_ram_in_place_is_refused(lab: LibvirtLab) -> None:
    guest = lab.domain()
    lab.bed.configure(save_image_format="lzop")
    refused = lab.cprctl("adopt", guest.name, "--yes", f"--device={guest.ram}")
    assert refused.returncode == EXIT_REFUSED
    assert "lzop" in refused.stderr


def test_domains_lie_side_by_side_in_one_file(each_lab: LibvirtLab, request: pytest.FixtureRequest) -> None:
    """Those that are shut off count as well. QEMU before 8.1 gets the start of a file alone."""
    old = request.node.callspec.params["each_lab"] == next(iter(RELEASES))
    pool = each_lab.shm / "pool"
    pool.touch(mode=0o600)
    os.truncate(pool, 256 << 20)
    guests = [each_lab.domain(name) for name in ("first", "second")]
    for guest in guests:
        guest.ram = pool
    guests[0].adopt()
    over = each_lab.cprctl("adopt", "second", "--yes", f"--device={pool}", "--offset=32M")
    assert over.returncode == EXIT_FAILED
    assert ("QEMU 8.1" if old else "overlaps that of VM first") in over.stderr
    beside = each_lab.cprctl("adopt", "second", "--yes", f"--device={pool}", "--offset=64M")
    assert beside.returncode == (EXIT_FAILED if old else 0), beside.stderr
    if old:
        return
    for guest in guests:
        guest.start()
        guest.until_counts()
    guests[0].save()
    guests[0].load()
    for guest in guests:
        guest.assert_unbroken()


def test_what_both_commands_print_as_json_is_in_the_schema(lab: LibvirtLab) -> None:
    guest = lab.domain()
    wanted = ("adopt", guest.name, f"--device={guest.ram}", "--json")
    for arguments, done in ((("--dry-run",), False), (("--yes",), True)):
        data = json.loads(lab.cprctl(*wanted, *arguments).stdout)
        Draft202012Validator({**SCHEMA["properties"]["adopt"], "$defs": SCHEMA["$defs"]}).validate(data)
        assert data["done"] is done
    data = json.loads(lab.cprctl("release", guest.name, "--json", "--yes").stdout)
    Draft202012Validator({**SCHEMA["properties"]["release"], "$defs": SCHEMA["$defs"]}).validate(data)
    assert lab.cprctl("adopt", "none", "--yes").returncode == EXIT_NOT_FOUND

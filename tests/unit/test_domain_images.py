# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's save image: read, made into that of a checkpoint, and kept where libvirt looks for it."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from cpr_agent.core.model import Manifest
from cpr_agent.domains.host import LibvirtPaths
from cpr_agent.domains.images import Images
from cpr_agent.domains.reads import Reads
from cpr_agent.domains.saved import DomainCheckpoints
from cpr_agent.errors import NotVmstate, ProofFailed, SaveFailed
from cpr_agent.store import vmstate
from cpr_agent.store.checkpoints import CheckpointStore
from cpr_agent.store.image import MAGIC, PARTIAL, header_of, rewritten
from tests.samples import manifest

STATE = b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0bpc-q35-10.0and its devices"
XML = "<domain><name>web1</name></domain>"
COOKIE = b"<qemuSaveCookie/>"


def image(xml: str = XML, *, magic: bytes = MAGIC, version: int = 2, form: int = 0, cookie: bytes = COOKIE) -> bytes:
    """As libvirt writes one: virQEMUSaveDataWrite() in src/qemu/qemu_saveimage.c."""
    data = xml.encode() + b"\0"
    cookie_at = len(data) if cookie else 0
    data = (data + cookie + b"\0").ljust(4096, b"\0")
    return struct.pack("=16s5I56x", magic, version, len(data), 0, form, cookie_at) + data + STATE


def with_checkpoint(xml: str, checkpoint: str) -> str:
    return xml.replace("<name>", f"<cpr:vm checkpoint='{checkpoint}'/><name>")


def checkpoint_of(xml: str) -> str:
    found = re.search("checkpoint='([^']*)'", xml)
    return found[1] if found else ""


# -- the format ------------------------------------------------------------------------------------------------------------


def test_an_image_has_the_domain_s_xml_and_qemu_s_state() -> None:
    head = header_of(image(), "f", "web1")
    assert (head.xml, head.cookie, head.was_running) == (XML, COOKIE, False)
    assert image()[head.state_at :] == STATE


@pytest.mark.parametrize("cookie", [COOKIE, b""], ids=["with a cookie", "without"])
def test_another_xml_leaves_the_cookie_and_the_state(cookie: bytes) -> None:
    was = image(cookie=cookie)
    longer = with_checkpoint(XML, "x" * 8000)
    now = rewritten(was, header_of(was, "f", "web1"), longer, running=True)
    head = header_of(now, "f", "web1")
    assert (head.xml, head.cookie, head.was_running) == (longer, cookie, True)
    assert now[head.state_at :] == STATE


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (image()[:50], "it has 50 bytes"),
        (image(magic=PARTIAL), "it is not complete"),
        (image(magic=b"something else!!"), "it starts with b'something"),
        (image(version=3), "its version is 3"),
        (image(form=5), "save_image_format in qemu.conf must be raw"),
        (image()[:2000], "it ends in its XML"),
        (
            image("<\udcff>".encode("utf-8", "surrogateescape").decode("latin-1")).replace(b"\xc3\xbf", b"\xff "),
            "not UTF-8",
        ),
    ],
    ids=["short", "partial", "foreign", "newer", "compressed", "cut off", "not text"],
)
def test_what_is_no_image_that_can_be_used_says_why(bad: bytes, why: str) -> None:
    with pytest.raises(NotVmstate, match=why):
        header_of(bad, "f", "web1")


def test_the_state_in_an_image_is_a_state_to_the_store(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(image())
    with path.open("rb") as file:
        found = vmstate.inspect(file.fileno(), str(path), "web1")
    assert (found.machine, found.size_bytes) == ("pc-q35-10.0", len(image()))


def test_an_image_without_qemu_s_state_is_none(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(image()[: -len(STATE)] + b"nothing of QEMU's")
    with path.open("rb") as file, pytest.raises(NotVmstate, match="it starts with b'noth'"):
        vmstate.inspect(file.fileno(), str(path), "web1")


# -- a save ----------------------------------------------------------------------------------------------------------------


def saved(images: Images, path: Path, *, running: bool = True) -> bytes:
    images.begin("web1", "id-1", running=running).write_bytes(image())
    with path.open("wb") as out:
        images.finish("web1", out.fileno())
    return path.read_bytes()


@pytest.mark.parametrize("running", [True, False], ids=["running", "paused"])
def test_what_libvirt_wrote_becomes_the_image_of_the_checkpoint(tmp_path: Path, *, running: bool) -> None:
    head = header_of(saved(Images(tmp_path / "images", with_checkpoint), tmp_path / "state", running=running), "f", "web1")
    assert checkpoint_of(head.xml) == "id-1"
    assert head.was_running is running


def test_a_new_agent_finishes_what_the_one_before_has_begun(tmp_path: Path) -> None:
    Images(tmp_path / "images", with_checkpoint).begin("web1", "id-1", running=False).write_bytes(image())
    with (tmp_path / "state").open("wb") as out:
        Images(tmp_path / "images", with_checkpoint).finish("web1", out.fileno())
    assert checkpoint_of(header_of((tmp_path / "state").read_bytes(), "f", "web1").xml) == "id-1"


def test_a_save_finds_no_image_of_one_before(tmp_path: Path) -> None:
    images = Images(tmp_path / "images", with_checkpoint)
    images.begin("web1", "id-1", running=True).write_bytes(image())
    assert not images.begin("web1", "id-2", running=True).exists()


def test_a_save_of_which_nothing_is_known_is_not_finished(tmp_path: Path) -> None:
    with (tmp_path / "state").open("wb") as out, pytest.raises(SaveFailed, match="not known any more"):
        Images(tmp_path / "images", with_checkpoint).finish("web1", out.fileno())


def test_an_image_with_the_ram_in_it_is_no_state(tmp_path: Path) -> None:
    """As a save would be whose capability somebody had turned off."""
    images = Images(tmp_path / "images", with_checkpoint)
    path = images.begin("web1", "id-1", running=True)
    path.write_bytes(image())
    os.truncate(path, vmstate.MAX_BYTES + 1)
    with (tmp_path / "state").open("wb") as out, pytest.raises(NotVmstate, match="no state has more"):
        images.finish("web1", out.fileno())


# -- where libvirt looks for it --------------------------------------------------------------------------------------------


class Kept:
    """A store with one checkpoint of web1, and libvirt's directory."""

    def __init__(self, root: Path) -> None:
        self.host = LibvirtPaths(root)
        self.host.images.mkdir(parents=True)
        self.images = Images(root / "images", with_checkpoint)
        self.store = CheckpointStore(root / "checkpoints", ())
        self.reads = Reads()
        self.both = DomainCheckpoints(self.store, self.host, self.reads, checkpoint_of, self.images.finish)
        self.managed = self.host.image("web1")

    def save(self) -> Manifest:
        pending = self.both.begin("web1", "")
        self.images.begin("web1", "id-1", running=True).write_bytes(image())
        self.images.finish("web1", pending.fd)
        made = manifest(vm="web1", id="id-1", vmstate=pending.seal())
        pending.commit(made)
        return made

    def state(self) -> bytes:
        return (self.store.root / "web1/vmstate").read_bytes()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_libvirt_has_the_image_once_the_checkpoint_is_durable(kept: Kept) -> None:
    pending = kept.both.begin("web1", "")
    kept.images.begin("web1", "id-1", running=True).write_bytes(image())
    kept.images.finish("web1", pending.fd)
    state = pending.seal()
    assert not kept.managed.exists()
    pending.commit(manifest(vm="web1", id="id-1", vmstate=state))
    assert kept.managed.read_bytes() == kept.state()
    assert kept.managed.stat().st_mode & 0o777 == 0o600


def test_a_save_that_is_undone_leaves_libvirt_nothing(kept: Kept) -> None:
    pending = kept.both.begin("web1", "")
    kept.images.begin("web1", "id-1", running=True).write_bytes(image())
    kept.images.finish("web1", pending.fd)
    pending.commit(manifest(vm="web1", id="id-1", vmstate=pending.seal()))
    pending.abort()
    assert not kept.managed.exists()


def test_a_checkpoint_that_is_given_up_leaves_libvirt_nothing(kept: Kept) -> None:
    kept.save()
    kept.both.discard("web1")
    assert not kept.managed.exists()


def test_a_checkpoint_that_is_spent_leaves_the_image_to_libvirt_which_has_it_open(kept: Kept) -> None:
    made = kept.save()
    kept.both.consume(made)
    assert kept.managed.exists()
    assert kept.both.live("web1") is None


def test_a_checkpoint_that_is_put_back_has_its_image_again(kept: Kept) -> None:
    made = kept.save()
    kept.both.consume(made)
    kept.managed.unlink()
    kept.both.restore("web1", made.id)
    assert kept.managed.read_bytes() == kept.state()


@pytest.mark.parametrize("content", [b"", b"damaged", image("<domain>another</domain>")], ids=["empty", "damaged", "other"])
def test_a_load_puts_the_proved_image_in_the_place_of_any_other(kept: Kept, content: bytes) -> None:
    made = kept.save()
    kept.managed.write_bytes(content)
    os.close(kept.both.open_vmstate(made, ""))
    assert kept.managed.read_bytes() == kept.state()


def test_a_load_leaves_the_image_that_libvirt_may_have_open(kept: Kept) -> None:
    made = kept.save()
    before = kept.managed.stat().st_ino
    os.close(kept.both.open_vmstate(made, ""))
    assert kept.managed.stat().st_ino == before


def test_whether_the_image_was_read_is_seen_and_the_agent_s_own_look_is_not(kept: Kept) -> None:
    made = kept.save()
    os.close(kept.both.open_vmstate(made, ""))
    assert not kept.reads.was_read(kept.managed)
    kept.managed.read_bytes()
    assert kept.reads.was_read(kept.managed)
    os.close(kept.both.open_vmstate(made, ""))
    assert kept.reads.was_read(kept.managed), "the agent's own look has not covered it up"


def test_a_read_is_seen_where_the_file_system_keeps_no_times_of_it(kept: Kept) -> None:
    """noatime, as far as it matters: a reader that leaves no time."""

    def read() -> None:
        fd = os.open(kept.managed, os.O_RDONLY | os.O_NOATIME)
        os.read(fd, 100)
        os.close(fd)

    made = kept.save()
    os.close(kept.both.open_vmstate(made, ""))
    assert not kept.reads.was_read(kept.managed)
    read()
    assert kept.reads.was_read(kept.managed)
    kept.reads.mark_unread(kept.managed)
    assert not kept.reads.was_read(kept.managed)
    read()
    kept.managed.write_bytes(b"another one, which is renamed over it")
    os.close(kept.both.open_vmstate(made, ""))
    assert not kept.reads.was_read(kept.managed)


def test_a_read_is_seen_by_an_agent_that_comes_later(kept: Kept) -> None:
    os.close(kept.both.open_vmstate(kept.save(), ""))
    kept.managed.read_bytes()
    assert Reads().was_read(kept.managed)


def test_a_state_that_was_changed_is_not_offered(kept: Kept) -> None:
    made = kept.save()
    kept.managed.unlink()
    (kept.store.root / "web1/vmstate").write_bytes(kept.state()[:-1] + b"x")
    with pytest.raises(ProofFailed):
        kept.both.open_vmstate(made, "")
    assert not kept.managed.exists()


def test_a_save_of_libvirt_s_own_stays(kept: Kept) -> None:
    """It has the RAM in it, and no checkpoint's id."""
    kept.save()
    kept.managed.write_bytes(image())
    kept.both.discard("web1")
    kept.both.settle("web1")
    assert kept.managed.read_bytes() == image()


@pytest.mark.parametrize("live", [True, False], ids=["live", "spent"])
def test_a_new_agent_sees_to_it_that_libvirt_has_just_the_live_ones(kept: Kept, *, live: bool) -> None:
    made = kept.save()
    if live:
        kept.managed.unlink()
    else:
        kept.store.consume(made)
    kept.both.settle("web1")
    assert kept.managed.exists() is live


@pytest.mark.parametrize("copied", ["in part", "as a whole"])
def test_an_interrupted_save_is_written_as_a_whole(kept: Kept, copied: str) -> None:
    """The agent ended as it copied what libvirt had written, or after that."""
    pending = kept.both.begin("web1", "")
    kept.images.begin("web1", "id-1", running=False).write_bytes(image())
    if copied == "in part":
        os.write(pending.fd, b"a part")
    else:
        kept.images.finish("web1", pending.fd)
    again = kept.both.reopen("web1", pending.path)
    made = manifest(vm="web1", id="id-1", vmstate=again.seal())
    again.commit(made)
    assert header_of(kept.state(), "f", "web1").was_running is False

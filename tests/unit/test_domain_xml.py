# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's XML: what goes in comes out again byte by byte, and nothing in it can do more than be refused."""

from __future__ import annotations

import re
import string
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr_agent.core.model import Bytes, LoadSection, SaveSection, Seconds
from cpr_agent.domains import refusals, tree, xml
from cpr_agent.domains.names import NAMESPACE, QEMU_NAMESPACE, Places
from cpr_agent.domains.part import OWN_ARGUMENTS, Adopted
from cpr_agent.errors import InvalidDefinition
from tests.libvirt.domains import QCOW2, domain_xml

PLACES = Places(Path("/run/cpr-agent"))
SIZE = Bytes(64 << 20)
UUID = "uuid:21dfda89-0355-4462-b7ed-7d7a01837540"
ADOPTED = Adopted(device=UUID, size=SIZE, offset=Bytes(2 << 20), align=Bytes(2 << 20))
INFO = """    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
"""


def domain(*, head: str = "", args: str = "", end: str = "") -> str:
    """As ``virsh dumpxml --inactive`` prints it."""
    inside = f"  <qemu:commandline>\n{args}  </qemu:commandline>\n" if args else ""
    declared = f" xmlns:qemu='{QEMU_NAMESPACE}'" if inside or "<qemu:" in end else ""
    return f"""<domain type='kvm'{declared}>
  <name>web1</name>
  <uuid>3eb49b3c-c2ef-4848-ab4d-9dbbc5c1d9e5</uuid>
{head}  <memory unit='KiB'>{SIZE >> 10}</memory>
  <currentMemory unit='KiB'>65536</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <graphics type='vnc' port='-1' autoport='yes' passwd='top&quot;secret'/>
  </devices>
{inside}{end}</domain>
"""


def arg(*words: str) -> str:
    quotes = {"'": "&apos;", '"': "&quot;"}
    return "".join(f"    <qemu:arg value='{escape(word, quotes)}'/>\n" for word in words)


def adopt(text: str, adopted: Adopted = ADOPTED) -> str:
    return xml.adopt(text, adopted, PLACES)


# -- there and back -----------------------------------------------------------------------------------------------------

texts = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff"), max_size=20
)
words = (
    st.sampled_from(["-device", "-global", "-foo", "a='\"<&>,b", "isa-debug-exit", "ICH9-LPC.x=on", "-boot", ""]) | texts
)
heads = st.sampled_from(["", "  <metadata/>\n", f"  <metadata>\n{INFO}  </metadata>\n"])
titles = st.sampled_from(["", "  <title>a &amp; b &gt; c</title>\n", "  <description>x\n y</description>\n"])


@st.composite
def domains(draw: st.DrawFn) -> str:
    args = arg(*draw(st.lists(words, max_size=6)))
    if draw(st.booleans()):
        args += "    <qemu:env name='X' value='&lt;'/>\n"
    end = draw(st.sampled_from(["", "  <qemu:capabilities>\n    <qemu:del capability='x'/>\n  </qemu:capabilities>\n"]))
    comment = draw(st.sampled_from(["", "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE.\n  virsh edit web1\n-->\n\n"]))
    return comment + domain(head=draw(titles) + draw(heads), args=args, end=end)


ranges = st.builds(
    Adopted,
    device=st.sampled_from([UUID, "/dev/shm/a 'b' \"c\" <&>", "/dev/hugepages/é"]),
    size=st.just(SIZE),
    offset=st.integers(0, 1 << 40).map(lambda n: Bytes(n * 4096)),
    align=st.sampled_from([Bytes(0), Bytes(2 << 20)]),
    save=st.builds(
        SaveSection,
        suspend=st.just("never"),
        order=st.integers(0, 10**6),
        timeout=st.integers(1, 10**4).map(Seconds),
        when_blocked=st.sampled_from([("refuse",), ("wait", "shut-down"), ()]),
    ),
    load=st.builds(LoadSection, on_lost_memory=st.sampled_from(["hold", "cold-start"])),
    shutdown_timeout=st.integers(1, 1000).map(Seconds),
)


@given(domains(), ranges)
def test_release_gives_back_what_was_there(text: str, adopted: Adopted) -> None:
    assert xml.release(adopt(text, adopted)) == text
    assert xml.release(text) == text


@given(domains(), ranges, ranges)
def test_a_second_adoption_takes_the_place_of_the_first(text: str, first: Adopted, second: Adopted) -> None:
    assert adopt(adopt(text, first), second) == adopt(text, second)


@given(domains(), ranges)
def test_what_was_adopted_is_read_again(text: str, adopted: Adopted) -> None:
    found = xml.read(adopt(text, adopted), PLACES)
    if not found.problem:  # an argument of the generated text may have been refused
        assert found.adopted == adopted


def test_the_definition_says_what_the_domain_is() -> None:
    text = adopt(domain(head="  <title>front &amp; end</title>\n"))
    found = xml.read_domain("web1", text.encode(), PLACES)
    assert (found.name, found.owner, found.vm.qemu) == ("web1", "libvirt", "/usr/bin/qemu-system-x86_64")
    assert found.vm.description == "front & end"
    assert found.memory.ranges[0].device == UUID
    assert found.save.suspend == "never"
    assert not found.vm.autostart


@given(domains(), texts)
def test_a_checkpoint_s_id_comes_and_goes(text: str, checkpoint: str) -> None:
    text = adopt(text)
    marked = xml.with_checkpoint(text, checkpoint)
    assert xml.checkpoint_of(marked) == checkpoint
    assert xml.with_checkpoint(marked, "") == text
    assert xml.with_checkpoint(marked, "other") == xml.with_checkpoint(text, "other")


def test_only_an_adopted_domain_can_carry_a_checkpoint() -> None:
    with pytest.raises(InvalidDefinition, match="not adopted"):
        xml.with_checkpoint(domain(), "id")


def test_the_diff_shows_the_change_and_no_password() -> None:
    """The password stands near the end, where the arguments of QEMU come."""
    said = xml.diff(domain(), adopt(domain()), "web1")
    assert "graphics" in said
    assert "secret" not in said
    added = [line for line in said.splitlines() if line.startswith("+") and "cpr:memory" in line]
    assert len(added) == 1
    assert UUID in added[0]


def test_the_later_machine_option_is_the_agent_s() -> None:
    text = adopt(domain(args=arg("-machine", "hpet=off") + "    <qemu:env name='X' value='1'/>\n"))
    values = re.findall(r"<qemu:arg value='([^']*)'/>", text)
    assert values[:2] == ["-machine", "hpet=off"]
    assert values[4:6] == ["-machine", "memory-backend=cpr-ram"]


# -- changed by hand ----------------------------------------------------------------------------------------------------


def changed(text: str, was: str, becomes: str) -> str:
    assert was in text
    return text.replace(was, becomes)


@pytest.mark.parametrize("start", [start for _, start in OWN_ARGUMENTS])
def test_an_argument_that_was_changed_by_hand_is_a_problem(start: str) -> None:
    text = changed(adopt(domain()), start, f"{start}x" if start.endswith(",") else f"{start},x=y")
    found = xml.read(text, PLACES)
    assert "by hand" in found.problem
    with pytest.raises(InvalidDefinition, match="cprctl release web1"):
        xml.read_domain("web1", text.encode(), PLACES)


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        (f"<memory unit='KiB'>{SIZE >> 10}<", "<memory unit='KiB'>131072<", "134217728 bytes of memory, and 67108864"),
        (' size="67108864"', ' size="64M" colour="red"', "unknown attribute 'colour'"),
        (' size="67108864"', ' size="much"', "is not a size"),
        (' size="67108864"', "", "size"),
        (f'device="{UUID}"', 'device="/etc/../x\x7f"', "device"),
        (f'device="{UUID}"', 'device="dax0.0"', "neither uuid"),
        (' offset="2097152"', ' offset="1"', "multiples of 4096"),
        (f'xmlns:cpr="{NAMESPACE}"', f'xmlns:cpr="{NAMESPACE}" user="root"', "unknown attribute 'user'"),
        ("</cpr:vm>", "<cpr:save order='1'/><cpr:save order='2'/></cpr:vm>", "each once"),
        ("</cpr:vm>", "<cpr:save suspend='always'/></cpr:vm>", "unknown attribute 'suspend'"),
        ("</cpr:vm>", "<cpr:save order='first'/></cpr:vm>", "order"),
        ("</cpr:vm>", "<cpr:save when-blocked='wait never'/></cpr:vm>", "when_blocked"),
        ("</cpr:vm>", "<cpr:load on-lost-memory='guess'/></cpr:vm>", "on_lost_memory"),
        ("</cpr:vm>", "<cpr:exec path='/bin/sh'/></cpr:vm>", "exec"),
        ("  <devices>", "  <devices>\n    <hostdev mode='subsystem' type='pci'/>", "device of the host"),
        ("<qemu:commandline>", "<qemu:commandline><qemu:arg value='-snapshot'/>", "-snapshot"),
    ],
)
def test_metadata_that_make_no_sense_are_a_problem(was: str, becomes: str, why: str) -> None:
    text = changed(adopt(domain()), was, becomes)
    assert why in xml.read(text, PLACES).problem


def test_the_settings_in_the_document_are_read() -> None:
    page = Path(__file__).parents[2].joinpath("docs/libvirt.md").read_text()
    written = re.search(r"^    <cpr:vm .*?</cpr:vm>$", page, re.MULTILINE | re.DOTALL)
    assert written
    size = re.search(r' size="(\d+)"', written[0])
    assert size
    adopted = Adopted(device=UUID, size=Bytes(int(size[1])), align=Bytes(2 << 20))
    text = adopt(changed(domain(), f">{SIZE >> 10}<", f">{adopted.size >> 10}<"), adopted)
    text = re.sub(r"    <cpr:vm .*?</cpr:vm>", lambda _: written[0], text, flags=re.DOTALL)
    found = xml.read_domain("web1", text.encode(), PLACES)
    assert (found.save.order, float(found.save.blocked_wait), float(found.vm.shutdown_timeout)) == (10, 120.0, 120.0)
    assert (found.load.on_lost_memory, found.load.resync_clock) == ("cold-start", "never")


def test_settings_of_save_and_load_are_read_from_the_metadata() -> None:
    inside = (
        "<cpr:save order='5' timeout='2min' when-blocked='wait shut-down'/><cpr:load on-lost-memory='cold-start'/></cpr:vm>"
    )
    found = xml.read_domain("web1", changed(adopt(domain()), "</cpr:vm>", inside).encode(), PLACES)
    assert (found.save.order, found.save.timeout, found.save.when_blocked) == (5, 120.0, ("wait", "shut-down"))
    assert found.load.on_lost_memory == "cold-start"


def test_metadata_that_are_gone_leave_arguments_that_release_takes_out() -> None:
    text = re.sub(r"\n  <metadata>.*</metadata>", "", adopt(domain()), flags=re.DOTALL)
    assert xml.is_touched(text)
    assert xml.read(text, PLACES).problem
    assert xml.release(text) == domain()


def test_arguments_that_are_gone_leave_metadata_that_release_takes_out() -> None:
    text = re.sub(r"\n  <qemu:commandline>.*</qemu:commandline>", "", adopt(domain()), flags=re.DOTALL)
    assert xml.read(text, PLACES).problem
    assert changed(xml.release(text), f" xmlns:qemu='{QEMU_NAMESPACE}'", "") == domain()


def test_a_rest_of_the_agent_s_part_is_not_released_in_silence() -> None:
    text = changed(adopt(domain()), "memory-backend-file,id=cpr-ram,", "memory-backend-file,share=off,id=cpr-ram,")
    with pytest.raises(InvalidDefinition, match="share=off.*virsh edit"):
        xml.release(text)


def test_another_namespace_is_not_ours() -> None:
    text = changed(adopt(domain()), NAMESPACE, f"{NAMESPACE}0")
    assert xml.read(text, PLACES).problem
    assert xml.checkpoint_of(text) == ""


# -- what can't be adopted ----------------------------------------------------------------------------------------------


def with_path(path: str) -> str:
    """A domain with the element that a path of the table of refusals names."""
    root = ElementTree.fromstring(domain())  # noqa: S314 - our own
    here = root
    for step in path.split("/"):
        match = re.fullmatch(r"(\w+)(?:\[@(\w+)='([\w-]+)'\])?", step)
        assert match, step
        found = None if match[2] else here.find(match[1])
        here = found if found is not None and step != path.split("/")[-1] else ElementTree.SubElement(here, match[1])
        if match[2]:
            here.set(match[2], match[3])
    return ElementTree.tostring(root, encoding="unicode")


@pytest.mark.parametrize("row", refusals._REFUSED, ids=lambda row: row[0])
def test_each_row_of_the_table_is_refused(row: tuple[str, str, str]) -> None:
    path, cause, remedy = row
    found = xml.reasons(with_path(path))
    assert refusals.Refusal(cause, remedy) in found
    assert all(one.remedy or "launchSecurity" in one.cause for one in found)


def test_the_document_has_each_row_of_the_table_and_no_other() -> None:
    page = Path(__file__).parents[2].joinpath("docs/libvirt.md").read_text()
    section = page.partition("## What can't be adopted")[2].partition("And, of a domain as a whole")[0]
    assert re.findall(r"^\| `([^`]*)` \|", section, re.MULTILINE) == [path for path, _, _ in refusals._REFUSED]


def test_a_domain_as_virt_install_writes_it_has_no_reason() -> None:
    text = Path(__file__).with_name("libvirt").joinpath("domain.xml").read_text()
    assert xml.reasons(text) == []
    assert xml.release(adopt(text)) == text


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        ("<name>web1<", "<name>web 1<", "name that no VM can have"),
        ("<name>web1<", "<name>../../etc<", "name that no VM can have"),
        ("<name>web1<", f"<name>{'x' * 64}<", "name that no VM can have"),
        ("type='kvm'", "type='xen'", "'xen'"),
        ("pc-q35-7.2", "s390-ccw-virtio-7.2", "s390-ccw"),
        ("arch='x86_64'", "arch='s390x'", "s390x"),
        ("arch='x86_64'", "arch='aarch64'", "aarch64"),
        ("pc-q35-7.2", "microvm", "microvm"),
        ("pc-q35-7.2", "", "machine ''"),
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64", "no path"),
        ("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu\n", "no path"),
    ],
)
def test_what_the_agent_does_not_know_is_refused(was: str, becomes: str, why: str) -> None:
    (one,) = xml.reasons(changed(domain(), was, becomes))
    assert why in one.cause


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("type='kvm'", "type='qemu'"),
        ("pc-q35-7.2", "pc-i440fx-noble"),
        ("arch='x86_64' machine='pc-q35-7.2'", "arch='aarch64' machine='virt-10.0'"),
        ("  <devices>", "  <iothreads>2</iothreads>\n  <devices>"),
        ("  <devices>", "  <devices>\n    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"),
        ("  <devices>", "  <memoryBacking><nosharepages/></memoryBacking>\n  <devices>"),
        ("/usr/bin/qemu-system-x86_64", "/opt/qemu/bin/qemu-system-x86_64"),
    ],
)
def test_what_changes_nothing_about_the_ram_is_not_refused(was: str, becomes: str) -> None:
    assert xml.reasons(changed(domain(), was, becomes)) == []


@pytest.mark.parametrize(
    "words",
    [
        ["-machine", "memory-backend=mine"],
        ["-M", "q35,memory-backend=mine"],
        ["--machine", "memory-backend=mine"],
        ["-object", "memory-backend-ram,id=mine,size=64M"],
        ["-object", '{"qom-type":"memory-backend-memfd","id":"mine"}'],
        ["-m", "4G"],
        ["-numa", "node"],
        ["-incoming", "defer"],
        ["-S"],
        ["-set", "object.x.share=off"],
        ["-readconfig", "/etc/x"],
        ["-global", "migration.x-ignore-shared=on"],
        ["-global", "driver=migration,property=x,value=y"],
        ["-device", "vfio-pci,host=01:00.0"],
        ["-device", '{"driver":"vfio-pci","host":"01:00.0"}'],
        ["-device", "ivshmem-plain,memdev=x"],
        ["-device", "driver=pc-dimm,memdev=x"],
        ["-device", "vhost-user-blk-pci,chardev=x"],
        ["-device", "loader,data=1,data-len=4,addr=0"],
        ["-netdev", "vhost-user,id=x,chardev=y"],
        ["-netdev", '{"type":"vhost-vdpa","id":"x"}'],
        ["-chardev", "null,id=cpragent"],
        ["-device", "virtio-blk-pci,id=cpr-ram"],
    ],
    ids=" ".join,
)
def test_arguments_that_collide_are_refused(words: list[str]) -> None:
    (one,) = xml.reasons(domain(args=arg(*words)))
    assert one.cause.count("in <qemu:commandline>") == 1
    assert words[0].lstrip("-") in one.cause


@pytest.mark.parametrize(
    "words",
    [
        ["-machine", "hpet=off"],
        ["-device", "isa-debug-exit"],
        ["-device", "loader,file=/boot/x,cpu-num=0"],
        ["-object", "rng-random,id=x,filename=/dev/urandom"],
        ["-netdev", "user,id=x,hostfwd=tcp::2222-:22"],
        ["-global", "ICH9-LPC.disable_s3=0"],
        ["-fw_cfg", "name=opt/x,string=memory"],
    ],
    ids=" ".join,
)
def test_other_arguments_are_kept(words: list[str]) -> None:
    assert xml.reasons(domain(args=arg(*words))) == []


# -- XML that somebody means ill by -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no XML",
        "<domain>",
        "<domain/>",
        "<network><name>x</name></network>",
        "<domain><name/></domain>",
        "<domain><name>x</name><memory>-1</memory></domain>",
        "<domain><name>x</name><memory unit='parsec'>1</memory></domain>",
        f"<domain><name>x</name><memory>{'9' * 5000}</memory></domain>",
        '<!DOCTYPE domain [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><domain><name>&b;</name></domain>',
        '<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain><name>x</name></domain>',
        "<domain><name>&undefined;</name></domain>",
        f"<domain><name>x</name>{'<a>' * 100}{'</a>' * 100}</domain>",
        f"<domain><name>x</name>{'<a/>' * (tree.MAX_ELEMENTS + 1)}</domain>",
        f"<domain><name>x</name>{' ' * tree.MAX_BYTES}</domain>",
        "<domain><name>x\x00</name></domain>",
        "<domain><name>\ud800</name></domain>",
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidDefinition):
        xml.read(text, PLACES)


def test_a_name_that_is_another_one_s_is_refused() -> None:
    with pytest.raises(InvalidDefinition, match="that of 'web1'"):
        xml.read_domain("web2", adopt(domain()).encode(), PLACES)
    with pytest.raises(InvalidDefinition, match="not UTF-8"):
        xml.read_domain("web1", b"\xff", PLACES)


@pytest.mark.parametrize("more", ["<a><qemu:b/></a>", "<a qemu:b='c'/>"])
def test_a_namespace_that_others_use_too_stays(more: str) -> None:
    text = adopt(domain()).replace("<devices>", f"<devices>{more}")
    assert more in xml.release(text)
    assert not xml.is_touched(xml.release(text))


@given(st.data())
def test_no_change_of_an_adopted_domain_s_text_does_more_than_be_refused(data: st.DataObject) -> None:
    """Whatever is read as adopted has the arguments that the agent would give it, and no others of that name."""
    text = adopt(domain())
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))
    inserted = data.draw(
        st.text(string.printable, max_size=10) | st.sampled_from(["cpr-ram", "<a>", "'/><qemu:arg value='"])
    )
    text = text[:begin] + inserted + text[end:]
    try:
        found = xml.read(text, PLACES)
    except InvalidDefinition:
        return
    if found.adopted and not found.problem:
        released = xml.release(text)
        assert not xml.is_touched(released)
        assert xml.reasons(released) == []
        assert xml.read(adopt(released, found.adopted), PLACES).adopted == found.adopted


@given(st.text(max_size=200))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for act in (xml.release, xml.is_touched, xml.reasons, xml.checkpoint_of):
        with pytest.raises(InvalidDefinition):
            act(f"<domain>{text}")


# -- virt-install ----------------------------------------------------------------------------------------------------------

SAMPLE = Path(__file__).with_name("libvirt")
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
SAMPLES: dict[str, dict[str, str]] = {"virt-install": {}, "virt-install-uefi": {"firmware": "efi", "more": TPM}}


def shape(element: ElementTree.Element, path: str = "") -> Counter[str]:
    """What there is, and of which kind; not how it is called, and where its files are."""
    known = ("type", "model", "bus", "mode", "name")
    kinds = sorted(f"{key}={value}" for key, value in element.attrib.items() if key in known)
    path = " ".join([f"{path}/{element.tag}", *kinds])
    return sum((shape(one, path) for one in element), Counter([path]))


@pytest.mark.parametrize("name", SAMPLES)
def test_domains_of_the_tests_have_what_virt_install_writes(name: str) -> None:
    wanted = ElementTree.fromstring((SAMPLE / f"{name}.xml").read_text())  # noqa: S314 - of the tests
    disk = QCOW2.format(path="/var/lib/libvirt/images/web1.qcow2")
    boot = "<boot dev='hd'/>"
    ours = domain_xml("web1", 1024, boot, Path("/console"), disk, number=1, kind="kvm", **SAMPLES[name])
    lacking = shape(wanted) - shape(ElementTree.fromstring(ours))  # noqa: S314 - likewise
    # libvirt makes the one, and the other says nothing to the tests.
    assert [path.rpartition("/")[2] for path in lacking] == ["uuid", "console type=pty"]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_virt_install_writes_can_be_adopted_and_released(name: str) -> None:
    text = (SAMPLE / f"{name}.xml").read_text()
    assert xml.reasons(text) == []
    adopted = xml.adopt(text, Adopted(device="/dev/shm/web1", size=Bytes(1 << 30)), PLACES)
    found = xml.read(adopted, PLACES)
    assert found.adopted
    assert found.problem == ""
    assert xml.release(adopted) == text

# SPDX-License-Identifier: GPL-2.0-or-later
"""Definitions: strict, and errors that help."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr_agent import daemon
from cpr_agent.core.model import Bytes, Definition, Seconds
from cpr_agent.core.settings import Settings
from cpr_agent.errors import InvalidDefinition
from cpr_agent.vm.cmdline import collisions, cpu_model, firmware_files, tap_devices
from cpr_agent.vm.definition import DefinitionDirectory, decode_toml, read_admins_file, read_definition

GOOD = """
[vm]
description = "front end"
arguments = ["-machine", "q35,accel=kvm"]
shutdown-timeout = "2min"
[memory]
size = "4G"
device = "uuid:21dfda89-0355-4462-b7ed-7d7a01837540"
offset = "2M"
"""


def write(tmp_path: Path, text: str, name: str = "web1") -> Path:
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_definition_is_read(tmp_path: Path) -> None:
    definition = read_definition(write(tmp_path, GOOD))
    assert definition.name == "web1"
    assert definition.memory.size == 4 << 30
    assert definition.memory.offset == 2 << 20
    assert float(definition.vm.shutdown_timeout) == 120
    assert definition.save.order == 100
    assert len(definition.digest) == 64


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("size", "sise", 'unknown key "memory.sise". Did you mean "size"?'),
        ("shutdown-timeout", "shutdown_timeout", 'Did you mean "shutdown-timeout"?'),
        ("[memory]", "[memroy]", 'Did you mean "memory"?'),
        ("description", "nonsense-zzz", "Known are: arguments"),
        ('"front end"', "7", "Expected `str`, got `int` - at `vm.description`"),
        ('"4G"', '"4 gigs"', "is not a size such as 512M or 4G"),
        ('"4G"', "true", "is not a size"),
        ('"2min"', '"soon"', "is not a duration"),
        ('"4G"', '"4097"', "multiples of 4096"),
        ("uuid:", "dax:", "neither uuid:"),
        ('"front end"', '"front', "is not TOML"),
        ('size = "4G"', "", "needs a size and a device"),
        ('size = "4G"', 'size = "0"', "needs a size and a device"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InvalidDefinition) as caught:
        read_definition(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["-web", "web 1", ".hidden", "x" * 64, "a@b"])
def test_a_name_that_no_unit_could_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidDefinition, match="is not a VM name"):
        read_definition(write(tmp_path, GOOD, name))


def test_bad_definitions_do_not_hide_good_ones(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, "[vm", "broken")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    good, bad = DefinitionDirectory(tmp_path, tmp_path, tmp_path).load_all()
    assert set(good) == {"web1"}
    assert set(bad) == {"broken", "binary"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "4G"),
        ("--m", "4G"),
        ("-S",),
        ("-incoming", "defer"),
        ("-name", "x"),
        ("-daemonize",),
        ("-machine", "q35,memory-backend=mine"),
        ("-M", "q35,memory-backend=mine"),
        ("-object", "memory-backend-ram,id=cpr-ram,size=1G"),
        ("-chardev", "socket,id=cpr-agent,path=/x"),
        ("-mon", "chardev=cpr-agent"),
    ],
)
def test_arguments_that_the_agent_adds_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert collisions(arguments)
    listed = ", ".join(f'"{argument}"' for argument in arguments)
    with pytest.raises(InvalidDefinition, match="what the agent adds itself"):
        read_definition(write(tmp_path, GOOD.replace('"-machine", "q35,accel=kvm"', listed)))


def test_other_arguments_are_the_admins() -> None:
    assert not collisions(("-machine", "q35", "-smp", "4", "-device", "virtio-net,id=net-cpr-x", "-qmp", "unix:/x"))


WRITERS = (
    "loader,addr=0x1000,data=0x2a,data-len=4",
    "data-len=8,addr=0x1000,driver=loader",
    '{"driver":"loader","addr":4096,"data-len":8}',
)


@pytest.mark.parametrize("device", WRITERS)
def test_a_loader_that_writes_to_ram_at_a_load_is_refused(tmp_path: Path, device: str) -> None:
    text = GOOD.replace('"-machine", "q35,accel=kvm"', f"'-device', '{device}'")
    with pytest.raises(InvalidDefinition, match="writes its data to the guest's RAM at every start"):
        read_definition(write(tmp_path, text))


def test_a_loader_of_a_file_is_none() -> None:
    assert not collisions(("-device", "loader,file=/srv/data,addr=0x1000", "-device", '{"driver":"loader","file":"/x"}'))
    assert not collisions(("-device", "", "-device", "{}"))


def test_a_device_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDefinition, match="can't be read as JSON"):
        read_definition(write(tmp_path, GOOD.replace('"-machine", "q35,accel=kvm"', "'-device', '{'")))


def test_the_packaged_examples_are_valid() -> None:
    root = Path(__file__).parents[2]
    assert decode_toml(root / "packaging/agent.toml", Settings) == Settings()
    assert decode_toml(root / "agent/cpr_agent/cli/example-vm.toml", Definition, name="web1").memory.size == 4 << 30


@given(st.integers(0, 1 << 20), st.sampled_from(["", "K", "M", "G", "T", "k", "MiB", "GB"]))
def test_sizes_are_powers_of_1024(number: int, unit: str) -> None:
    exponent = " KMGT".index(unit[:1].upper() or " ")
    assert Bytes.parse(f"{number}{unit}") == number << (10 * exponent)


@given(st.integers(0, 10000))
def test_durations_have_units(number: int) -> None:
    assert Seconds.parse(f"{number}ms") * 1000 == pytest.approx(number)
    assert Seconds.parse(f"{number}min") == Seconds.parse(f"{number * 60}s") == Seconds.parse(str(number * 60))


def test_firmware_is_found_wherever_it_is_named() -> None:
    argv = [
        *("-bios", "/fw/bios.bin"),
        *("-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/fw/a,,b.fd"),
        *("-drive", "if=virtio,file=/disk.qcow2"),
        *("-blockdev", "driver=raw,node-name=third,file.driver=file,file.filename=/fw/third.fd"),
        *("-M", "q35,pflash1=third"),
        *("-blockdev", "driver=file,node-name=below,filename=/fw/vars.fd"),
        *("--blockdev", '{"driver": "raw", "node-name": "vars", "file": "below"}'),
        *("-blockdev", '{"driver": "raw", "node-name": "code", "file": {"driver": "file", "filename": "/fw/code.fd"}}'),
        *("-machine", "q35,pflash0=code,pflash1=vars"),
        *("-device", "virtio-net-pci,romfile=/fw/efi-virtio.rom"),
        *("-bios", "found-in-a-directory-of-qemu.bin"),
    ]
    assert firmware_files(argv) == [
        "/fw/bios.bin",
        "/fw/efi-virtio.rom",
        "/fw/a,b.fd",
        "/fw/third.fd",
        "/fw/code.fd",
        "/fw/vars.fd",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize(
    ("mode", "owner", "said"),
    [(0o644, 65534, "belongs to user 65534"), (0o664, 0, "others may write"), (0o646, 0, "others may write")],
)
def test_a_file_that_others_could_have_written_decides_nothing(tmp_path: Path, mode: int, owner: int, said: str) -> None:
    """It says as whom QEMU runs, and on which files."""
    good = write(tmp_path, GOOD)
    bad = write(tmp_path, GOOD, "web2")
    bad.chmod(mode)
    os.chown(bad, owner, -1)
    found, refused = DefinitionDirectory(tmp_path, tmp_path, tmp_path).load_all()
    assert list(found) == [good.stem]
    assert said in str(refused["web2"])
    assert f"chown root: {bad}" in str(refused["web2"])
    for read in (read_admins_file, daemon._settings):  # and so is agent.toml
        with pytest.raises(InvalidDefinition, match=said):
            read(bad)


def test_neither_does_one_in_a_directory_of_others_or_behind_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    real = write(theirs, GOOD)
    link = tmp_path / "linked.toml"
    link.symlink_to(real)
    with pytest.raises(InvalidDefinition, match="is a symbolic link"):
        read_admins_file(link)
    theirs.chmod(0o777)
    with pytest.raises(InvalidDefinition, match="others may write"):
        read_admins_file(real)


def test_tap_devices_are_found_by_their_names() -> None:
    argv = [
        *("-netdev", "tap,id=net0,ifname=tap0,queues=2"),
        *("--netdev", '{"type": "tap", "id": "net1", "ifname": "tap1"}'),
        *("-nic", "tap,ifname=tap2"),
        *("-netdev", "tap,id=net3"),  # QEMU makes one
        *("-netdev", "bridge,id=net4,br=br0"),
        *("-nic", "user,hostfwd=tcp::22-:22"),
    ]
    assert tap_devices(argv) == ["tap0", "tap1", "tap2"]


@pytest.mark.parametrize(
    ("argument", "name", "props"),
    [
        ("host", "host", {}),
        ("EPYC,+avx2,-svm,phys-bits=0x28", "EPYC", {"avx2": True, "svm": False, "phys-bits": 40}),
        ("max,pmu=off,vendor=GenuineIntel", "max", {"pmu": False, "vendor": "GenuineIntel"}),
        ("", "qemu64", {}),
    ],
)
def test_a_cpu_argument_as_qapi_has_it(argument: str, name: str, props: dict[str, object]) -> None:
    assert cpu_model(["qemu", "-cpu", argument] if argument else ["qemu"]) == {"name": name, "props": props}

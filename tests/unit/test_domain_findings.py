# SPDX-License-Identifier: GPL-2.0-or-later
"""What `check` says of libvirt's settings on a host with adopted domains: with the files that Debian 12 and 13 have."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cpr_agent.core.model import Finding
from cpr_agent.domains import apparmor, qemu_conf
from cpr_agent.domains.host_findings import HOOK, LibvirtSurroundings

ROOT = Path(__file__).parents[2]
ADOPTED = {"web1": ["/dev/dax0.0"]}
DEBIAN_12 = "  /dev/kvm rw,\n  owner /{dev,run}/shm/spice.* rw,\n  #include <local/abstractions/libvirt-qemu>\n"
"""The parts of its abstractions/libvirt-qemu that count here; local/abstractions/libvirt-qemu is empty there."""
DEBIAN_13 = (
    "  /dev/kvm rw,\n  include if exists <abstractions/libvirt-qemu.d>\n"
    "  include if exists <local/abstractions/libvirt-qemu>\n"
)


def put(root: Path, name: str, text: str = "", mode: int = 0o644) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host on which all is well."""
    put(tmp_path, HOOK, "#!/bin/sh\n", 0o755)
    put(tmp_path, "run/libvirtd.pid", "1\n")
    put(tmp_path, "etc/default/libvirt-guests", "#ON_SHUTDOWN=suspend\nON_SHUTDOWN=shutdown\n")
    put(tmp_path, "etc/libvirt/qemu.conf", qemu_conf_with('cgroup_device_acl = [ "/dev/null", "/dev/kvm", "/dev/dax0.0" ]'))
    put(tmp_path, "sys/module/apparmor/parameters/enabled", "Y\n")
    put(tmp_path, "etc/apparmor.d/abstractions/libvirt-qemu", DEBIAN_13)
    ours = (ROOT / "policies/apparmor/abstractions/libvirt-qemu.d/cpr-agent").read_text()
    put(tmp_path, "etc/apparmor.d/abstractions/libvirt-qemu.d/cpr-agent", ours)
    put(tmp_path, "etc/apparmor.d/local/abstractions/libvirt-qemu")
    for parent in tmp_path.parents:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    return tmp_path


def qemu_conf_with(*lines: str) -> str:
    return "\n".join(["# Master configuration file for the QEMU driver.", '#user = "root"', *lines, ""])


def of(host: Path, adopted: Mapping[str, Sequence[str]] = ADOPTED, heard: float = 0.0) -> list[Finding]:
    surroundings = LibvirtSurroundings(host, lambda: adopted, lambda: heard)
    return [*surroundings.findings(), *(one for vm in adopted for one in surroundings.findings_of(vm))]


def only(host: Path, code: str, adopted: Mapping[str, Sequence[str]] = ADOPTED) -> Finding:
    (found,) = of(host, adopted)
    assert found.code == code
    assert found.why
    assert found.remedy
    return found


def test_a_host_on_which_all_is_well_has_no_finding(host: Path) -> None:
    assert of(host) == []


def test_a_host_without_adopted_domains_is_not_looked_at(tmp_path: Path) -> None:
    surroundings = LibvirtSurroundings(tmp_path / "nothing", dict)
    assert surroundings.findings() == []
    assert surroundings.findings_of("web1") == []


def test_a_hook_that_is_missing_turned_off_or_others_to_change(host: Path) -> None:
    hook = host / HOOK
    hook.chmod(0o644)
    assert "is not executable" in only(host, "libvirt-hook").what
    hook.chmod(0o777)
    assert "others may write to" in only(host, "libvirt-hook").what
    hook.unlink()
    assert "is not there" in only(host, "libvirt-hook").what


def test_a_daemon_that_was_started_before_its_hook_was_there(host: Path) -> None:
    hook, pid = host / HOOK, host / "run/libvirtd.pid"
    while hook.stat().st_ctime <= pid.stat().st_ctime:
        hook.chmod(0o755)  # it is put there again
    found = only(host, "libvirt-hook")
    assert found.severity == "warning"
    assert "systemctl restart libvirtd" in found.remedy
    assert of(host, heard=hook.stat().st_ctime + 1) == [], "the hook was heard of since"
    pid.unlink()
    assert of(host) == [], "it is started at need, and sees the hook then"


def test_another_hook_that_could_end_a_loaded_guest(host: Path) -> None:
    put(host, "etc/libvirt/hooks/qemu.d/passthrough", "#!/bin/sh\n", 0o755)
    put(host, "etc/libvirt/hooks/qemu.d/README", "not executable")
    assert "passthrough is a hook of libvirt's as well" in only(host, "libvirt-other-hook").what


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ON_SHUTDOWN=suspend\n", True),
        ('ON_SHUTDOWN="suspend"\n', True),
        ("ON_SHUTDOWN=shutdown\nON_SHUTDOWN=suspend\n", True),
        ("# nothing is set: suspend is libvirt's own default\n", True),
        ("ON_SHUTDOWN=shutdown\n", False),
        ("ON_SHUTDOWN='shutdown'\n", False),
    ],
)
def test_libvirt_guests_that_would_write_ram_to_the_disk(host: Path, text: str, *, told: bool) -> None:
    put(host, "etc/default/libvirt-guests", text)
    assert ([one.code for one in of(host)] == ["libvirt-guests"]) == told


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('auto_shutdown_try_save = "persistent"', "libvirt-auto-shutdown"),
        ('auto_shutdown_try_shutdown = "all"', "libvirt-auto-shutdown"),
        ("auto_shutdown_poweroff = 'all'", "libvirt-auto-shutdown"),
        ('save_image_format = "sparse"', "libvirt-image-format"),
        ('snapshot_image_format = "gzip"', "libvirt-image-format"),
        ('user = "root"', "libvirt-user"),
        ('user = "+0"', "libvirt-user"),
        ("user = ", "libvirt-conf"),
    ],
)
def test_settings_of_qemu_conf(host: Path, line: str, code: str) -> None:
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with('cgroup_device_acl = [ "/dev/dax0.0" ]', line))
    assert [one.code for one in of(host)] == [code]


def test_harmless_settings_of_qemu_conf(host: Path) -> None:
    lines = ('cgroup_device_acl = [ "/dev/dax0.0" ]', 'auto_shutdown_try_save = "none"', 'save_image_format = "raw"')
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with(*lines, 'user = "libvirt-qemu"'))
    assert of(host) == []


def test_a_device_that_qemu_would_not_see_and_the_line_that_shows_it(host: Path) -> None:
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with())
    found = only(host, "libvirt-device-acl")
    assert found.vm == "web1"
    line = found.remedy.partition(", then")[0]
    assert qemu_conf.devices(qemu_conf.parse(line)) == [*qemu_conf.DEFAULT_DEVICES, "/dev/dax0.0"]
    put(host, "etc/libvirt/qemu.conf", line)
    assert of(host) == []


def test_the_line_shows_the_devices_that_may_have_the_memory_after_the_next_boot(host: Path) -> None:
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with())
    put(host, "dev/dax1.0")
    put(host, "run/virtqemud.pid")
    (host / "run/libvirtd.pid").unlink()
    remedy = only(host, "libvirt-device-acl").remedy
    assert '"/dev/dax0.0", "/dev/dax1.0" ]' in remedy
    assert remedy.endswith("then: systemctl restart virtqemud")


def test_apparmor_as_debian_12_has_it_and_the_line_that_mends_it(host: Path) -> None:
    put(host, "etc/apparmor.d/abstractions/libvirt-qemu", DEBIAN_12)
    found = only(host, "libvirt-apparmor")
    assert found.vm == "web1"
    subprocess.run(["sh", "-c", found.remedy], check=True)
    assert of(host) == []


def test_apparmor_and_ram_in_a_file(host: Path) -> None:
    adopted = {"web1": ["/mnt/pmem/web1"]}
    found = only(host, "libvirt-apparmor", adopted)
    assert "/mnt/pmem/web1" in found.what
    subprocess.run(["sh", "-c", found.remedy], check=True)
    assert of(host, adopted) == []


def test_hosts_without_apparmor_or_with_libvirt_outside_of_it(host: Path) -> None:
    put(host, "etc/apparmor.d/abstractions/libvirt-qemu", DEBIAN_12)
    put(host, "sys/module/apparmor/parameters/enabled", "N\n")
    assert of(host) == []
    put(host, "sys/module/apparmor/parameters/enabled", "Y\n")
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with('cgroup_device_acl = ["/dev/dax0.0"]', 'security_driver = "none"'))
    assert of(host) == []
    put(
        host,
        "etc/libvirt/qemu.conf",
        qemu_conf_with('cgroup_device_acl = ["/dev/dax0.0"]', 'security_driver = [ "selinux" ]'),
    )
    assert of(host) == []
    (host / "etc/apparmor.d/abstractions/libvirt-qemu").unlink()
    put(host, "etc/libvirt/qemu.conf", qemu_conf_with('cgroup_device_acl = ["/dev/dax0.0"]'))
    assert of(host) == []


@pytest.mark.parametrize(
    ("rule", "path", "may"),
    [
        ("/dev/dax* rw,", "/dev/dax0.0", True),
        ("/dev/dax* r,", "/dev/dax0.0", False),
        ("deny /dev/dax* rw,", "/dev/dax0.0", False),
        ("owner /dev/dax* rw,", "/dev/dax0.0", False),
        ("# /dev/dax* rw,", "/dev/dax0.0", False),
        ("/dev/* rwk,", "/dev/shm/web1", False),
        ("/dev/** rwk,", "/dev/shm/web1", True),
        ("/{dev,run}/shm/web? rw,", "/dev/shm/web1", True),
        ("/{dev,run}/shm/web? rw,", "/sys/shm/web1", False),
        ("/mnt/web[0-3] rw,", "/mnt/web1", True),
        ("/mnt/web[0-3] rw,", "/mnt/web4", False),
        ("/mnt/a.b rw,", "/mnt/axb", False),
        ('"/mnt/a b" rw,', "/mnt/ab", False),
    ],
)
def test_rules_of_apparmor_are_read_as_it_reads_them(rule: str, path: str, *, may: bool) -> None:
    assert apparmor.may_write(f"  {rule}\n", path) is may


def test_an_abstraction_that_includes_itself_ends(tmp_path: Path) -> None:
    put(tmp_path, apparmor.ABSTRACTION, "  include <abstractions/libvirt-qemu>\n  /x rw,\n")
    assert apparmor.may_write(apparmor.rules_text(tmp_path), "/x")


def test_qemu_conf_is_read_as_libvirt_reads_it() -> None:
    text = """
    # "a comment"
    one = "1" # and one here
    two=2
    three = 'a # b'
    four = [
       "x", # the first
       'y'
    ]
    five = []
    long = \"\"\"a "b"\nc\"\"\"
    one = "again"
    """
    assert qemu_conf.parse(text) == {
        "one": "again",
        "two": "2",
        "three": "a # b",
        "four": ["x", "y"],
        "five": [],
        "long": 'a "b"\nc',
    }
    for bad in ("one", "= 1", "one = 'x", "one = [ 'x'\n] ]", "one = x"):
        with pytest.raises(ValueError, match="can't be read|has no value"):
            qemu_conf.parse(bad)


def test_apparmor_reads_our_drop_in(tmp_path: Path) -> None:
    profile = put(tmp_path, "profile", "profile test {\n  include if exists <abstractions/libvirt-qemu.d>\n}\n")
    source = ROOT / "policies/apparmor"
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "-I", str(source), str(profile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = apparmor.rules_text(source) or (source / apparmor.DROP_INS / "cpr-agent").read_text()
    assert apparmor.may_write(text, "/dev/dax0.0")
    assert not apparmor.may_write(text, "/dev/shm/web1")
    assert not apparmor.may_write(text, "/run/cpr-agent/gate/web1")
    assert not apparmor.may_write(text, "/run/cpr-agent/hook.sock")

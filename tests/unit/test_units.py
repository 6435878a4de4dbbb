# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemctl and journalctl print of a host's units, read; and how long a shutdown is delayed after a boot."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cpr_agent.core.model import BootTimes, Survives, UnitStop
from cpr_agent.host import units
from cpr_agent.host.kexec import DEFAULT_MINIMUM_UPTIME_S, SystemdKexec, minimum_uptime_s, timespan_s
from cpr_agent.host.units import STOPPED, STOPPING, NoUnits, initrd_of, said, stops_of, units_of
from tests.lab import script

ROOT = Path(__file__).parent.parent.parent
SHOWN = """\
Id=gitlab.service
Names=gitlab.service git.service
LoadState=loaded
ActiveState=active
Transient=no
CanStart=yes
CanStop=yes
RefuseManualStart=no
RefuseManualStop=no
Requires=sysinit.target system.slice
BindsTo=
RequiredBy=
BoundBy=worker.service
ConsistsOf=sidecar.service
PropagatesStopTo=last.service
Wants=redis.service
After=sysinit.target redis.service
Before=shutdown.target multi-user.target
TriggeredBy=gitlab.socket
InactiveExitTimestampMonotonic=5000000
ActiveEnterTimestampMonotonic=7500000
InactiveEnterTimestampMonotonic=0

Id=once.service
Names=once.service
LoadState=loaded
ActiveState=inactive
Transient=yes
CanStart=yes
CanStop=yes
InactiveExitTimestampMonotonic=5000000
ActiveEnterTimestampMonotonic=0
InactiveEnterTimestampMonotonic=6000000

Id=srv-backup.mount
LoadState=loaded
ActiveState=active
Where=/srv/backup
CanStop=yes
RefuseManualStop=yes
InactiveExitTimestampMonotonic=
ActiveEnterTimestampMonotonic=x

Id=gone.service
Names=gone.service
LoadState=not-found
ActiveState=inactive"""


def shown(text: str = SHOWN) -> dict[str, Any]:
    return {unit.name: unit for unit in units_of(text.splitlines())}


def test_a_unit_has_what_stops_with_it_and_what_it_waited_for() -> None:
    unit = shown()["gitlab.service"]
    assert unit.takes_along == {"worker.service", "sidecar.service", "last.service"}
    assert (unit.wants, unit.after) == ({"redis.service"}, {"sysinit.target", "redis.service"})
    assert unit.aliases == {"gitlab.service", "git.service"}
    assert unit.triggered_by == {"gitlab.socket"}
    assert (unit.began_s, unit.ended_s) == (5.0, 7.5)
    assert unit.exists and unit.runs and unit.startable and unit.stoppable


def test_a_oneshot_has_started_when_it_is_inactive_again() -> None:
    unit = shown()["once.service"]
    assert (unit.began_s, unit.ended_s, unit.runs) == (5.0, 6.0, False)
    assert not unit.startable, "it was made at run time"


def test_what_is_missing_or_senseless_is_unknown() -> None:
    unit = shown()["srv-backup.mount"]
    assert (unit.began_s, unit.ended_s, unit.mount_point, unit.stoppable) == (0.0, 0.0, "/srv/backup", False)
    assert not shown()["gone.service"].exists


def test_a_unit_that_was_cut_off_is_left_out() -> None:
    assert list(shown(SHOWN[: SHOWN.index("LoadState=not-found")])) == [
        "gitlab.service",
        "once.service",
        "srv-backup.mount",
    ]


def test_a_unit_that_was_started_again_and_is_not_up_yet_has_not_ended() -> None:
    text = "Id=a.service\nInactiveExitTimestampMonotonic=9000000\nActiveEnterTimestampMonotonic=3000000\n\n"
    assert shown(text)["a.service"].ended_s == 0.0


def entry(message_id: str, unit: Any, at_s: float) -> dict[str, Any]:
    return {"MESSAGE_ID": message_id, "UNIT": unit, "__REALTIME_TIMESTAMP": str(int(at_s * 1e6))}


def test_a_stop_lasts_from_its_first_word_to_its_last() -> None:
    entries = [
        entry(STOPPING, "slow.service", 10.0),
        entry(STOPPED, "timers.target", 10.5),
        entry(STOPPING, "hangs.service", 11.0),
        entry(STOPPED, "slow.service", 15.0),
    ]
    assert list(stops_of(entries, 20.0)) == [
        UnitStop("timers.target", 10.5, 10.5),
        UnitStop("slow.service", 10.0, 15.0),
        UnitStop("hangs.service", 11.0, 20.0),
    ]


@pytest.mark.parametrize(
    "strange",
    [{}, entry(STOPPED, None, 5.0), entry(STOPPED, ["a", "b"], 5.0), {**entry(STOPPED, "a", 1), "__REALTIME_TIMESTAMP": 5}],
)
def test_a_strange_entry_is_no_stop(strange: dict[str, Any]) -> None:
    assert list(stops_of([strange], 20.0)) == []


def kernel_says(*messages: str) -> list[dict[str, Any]]:
    return [
        {"MESSAGE": message, "_SOURCE_MONOTONIC_TIMESTAMP": str(number * 100_000)}
        for number, message in enumerate(messages, 1)
    ]


def test_the_initrd_begins_when_the_kernel_runs_its_init() -> None:
    assert initrd_of(
        kernel_says("Linux", "Freeing initrd memory: 4972K", "Run /init as init process", "Run x as init process")
    ) == (
        0.3,
        4972 << 10,
    )
    assert initrd_of(kernel_says("Linux", "Run /sbin/init as init process")) == (0.0, 0)
    assert initrd_of([]) == (0.0, 0)


# -- bounds ---------------------------------------------------------------------------------------------------------------


def run(*command: str, **options: Any) -> list[str]:
    return asyncio.run(said(*command, **options))


def test_a_program_is_heard_to_its_end_and_not_beyond_the_line_that_is_wanted() -> None:
    assert run("printf", "a\\nb\\nc") == ["a", "b", "c"]
    assert run("yes", until=lambda line: line == "y") == ["y"]


def test_a_program_that_is_not_there_or_fails_says_nothing() -> None:
    assert run("/no/such/program") == []
    assert run("false") == []


def test_a_program_that_hangs_or_says_too_much_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "TIMEOUT_S", 0.3)
    assert run("sh", "-c", "echo first; exec sleep 1000") == ["first"]
    monkeypatch.setattr(units, "TIMEOUT_S", 30.0)
    monkeypatch.setattr(units, "MAX_BYTES", 1000)
    assert len(run("yes")) == 500
    monkeypatch.setattr(units, "LINE_BYTES", 100)
    assert run("sh", "-c", "echo first; head -c 100000 /dev/zero") == ["first"]


@pytest.mark.parametrize("ending", ["exec sleep 1000", "kill -9 $$"])
def test_what_is_wanted_whole_is_not_taken_in_part(tools: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """A unit whose dependents were cut off would seem to be nobody's."""
    monkeypatch.setattr(units, "TIMEOUT_S", 0.5)
    (tools / "shown").write_text(SHOWN)
    script(tools / "systemctl", f"#!/bin/sh\ncat {tools}/shown\n{ending}\n")
    assert asyncio.run(of_systemd().all()) == {}


class FakeSystemd:
    """Of the real one only the acts: there is no PID 1 to ask."""

    def __init__(self, *results: str) -> None:
        self.results = list(results)
        self.asked: list[tuple[str, float | None]] = []

    async def stop_unit(self, name: str, timeout_s: float | None) -> str:
        self.asked.append((name, timeout_s))
        return self.results.pop(0)

    start_unit = stop_unit

    def version(self) -> int:
        return int(self.results.pop(0))

    def mounts_to_come(self) -> set[str]:
        return {"srv.mount", "srv-vm\\x20images.mount", "mnt-backup.mount"}

    def active_state(self, name: str) -> str:
        return "active" if name in ("dev-vg-web1.device", "sys-subsystem-net-devices-tap1.device") else "inactive"

    def manager_monotonic_s(self, name: str) -> float:
        return {"UserspaceTimestampMonotonic": 3.5, "InitRDTimestampMonotonic": 1.25}[name]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that come before the host's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def says(tools: Path, name: str, text: str) -> Path:
    """A program that prints ``text``, and writes its arguments down."""
    (tools / f"{name}.says").write_text(text)
    script(tools / name, f'#!/bin/sh\nprintf "%s\\n" "$@" >{tools}/{name}.asked\ncat {tools}/{name}.says\n')
    return tools / f"{name}.asked"


def of_systemd(*results: str) -> units.SystemdUnits:
    return units.SystemdUnits(FakeSystemd(*results))  # type: ignore[arg-type]


def test_pid_1_is_asked_for_all_units_and_for_those_that_are_named(tools: Path) -> None:
    asked = says(tools, "systemctl", SHOWN)
    found = asyncio.run(of_systemd().all(["gone.service"]))
    assert set(found) == {"gitlab.service", "once.service", "srv-backup.mount", "gone.service"}
    show, properties, *names = asked.read_text().splitlines()
    assert (show, names) == ("show", ["--", "gone.service", "*"])
    assert {"RequiredBy", "BoundBy", "InactiveExitTimestampMonotonic"} <= set(properties.partition("=")[2].split(","))


def test_a_stop_is_waited_for_without_a_limit_of_its_own_and_its_result_told() -> None:
    host = of_systemd("done", "canceled")
    assert asyncio.run(host.stop("a.service")) == ""
    assert asyncio.run(host.start("a.service")) == "a.service: systemd says canceled"


def test_the_shutdown_of_the_boot_before_is_read_within_its_bounds(tools: Path) -> None:
    lines = [entry(STOPPING, "slow.service", 1000.2), entry(STOPPED, "slow.service", 1003.0)]
    asked = says(tools, "journalctl", "\n".join([*map(json.dumps, lines), "no json", "[]"]))
    assert asyncio.run(of_systemd().stops("1-2-3", 1000.1, 1009.5)) == [UnitStop("slow.service", 1000.2, 1003.0)]
    assert {"--boot=123", "--since=@1000", "--until=@1010", "_PID=1"} <= set(asked.read_text().splitlines())


def test_times_of_this_boot_are_the_kernels_and_pid_1s(tools: Path) -> None:
    messages = kernel_says("Freeing initrd memory: 8K", "Run /init as init process")
    says(tools, "journalctl", "\n".join(map(json.dumps, messages)))
    assert asyncio.run(of_systemd().boot_times()) == BootTimes(0.2, 3.5, 8192)
    says(tools, "journalctl", "")
    assert asyncio.run(of_systemd().boot_times()) == BootTimes(1.25, 3.5, 0), "an initrd with systemd tells as well"


def test_without_systemd_there_are_no_units() -> None:
    none = NoUnits()
    assert asyncio.run(none.all(["a.service"])) == {}
    assert "does not run under systemd" in asyncio.run(none.stop("a.service"))
    assert asyncio.run(none.stops("boot", 0.0, 1.0)) == []
    assert asyncio.run(none.boot_times()).userspace_s == 0.0


# -- MinimumUptimeSec= ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("15", 15.0), ("15s", 15.0), (" 1min 30s ", 90.0), ("1min30s", 90.0), ("500ms", 0.5), ("2 hours", 7200.0)),
        *(("0", 0.0), ("infinity", math.inf), ("1.5min", 90.0)),
        *(("", -1.0), ("soon", -1.0), ("5 parsecs", -1.0), ("-5", -1.0), ("1min, 3s", -1.0)),
    ],
)
def test_a_length_of_time_is_read_as_systemd_does(text: str, seconds: float) -> None:
    assert timespan_s(text, -1.0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("configured", "command_line", "seconds"),
    [
        ("", "root=/dev/sda", DEFAULT_MINIMUM_UPTIME_S),
        ("[Manager]\n#MinimumUptimeSec=15s", "", DEFAULT_MINIMUM_UPTIME_S),
        ("[Manager]\nMinimumUptimeSec=0", "", 0.0),
        ("[Manager]\nMinimumUptimeSec = 1min\n[Manager]\nMinimumUptimeSec=2min", "", 120.0),
        ("[Manager]\nMinimumUptimeSec=1min\nMinimumUptimeSec=nonsense", "", 60.0),
        ("[Other]\nMinimumUptimeSec=1min", "", DEFAULT_MINIMUM_UPTIME_S),
        ("[Manager]\nMinimumUptimeSec=1min", "quiet systemd.minimum_uptime_sec=5 ro", 5.0),
        ("", 'systemd.minimum-uptime-sec="7"', 7.0),
        ("", "rd.systemd.minimum_uptime_sec=5", DEFAULT_MINIMUM_UPTIME_S),
    ],
)
def test_the_least_uptime_is_that_of_the_files_and_of_the_command_line(
    configured: str, command_line: str, seconds: float
) -> None:
    assert minimum_uptime_s(configured.splitlines(), command_line) == seconds


def kexec(version: int, run_dir: Path) -> SystemdKexec:
    return SystemdKexec(FakeSystemd(str(version)), run_dir, run_dir)  # type: ignore[arg-type]


def test_a_systemd_that_delays_no_shutdown_is_not_asked_for_more(tools: Path) -> None:
    asked = says(tools, "systemd-analyze", "[Manager]\nMinimumUptimeSec=1h\n")
    assert asyncio.run(kexec(260, tools).minimum_uptime_s()) == 0.0
    assert not asked.exists()


def test_one_that_does_has_what_its_files_say(tools: Path) -> None:
    asked = says(tools, "systemd-analyze", "# /etc/systemd/system.conf\n[Manager]\nMinimumUptimeSec=1h\n")
    assert asyncio.run(kexec(261, tools).minimum_uptime_s()) == 3600.0
    assert asked.read_text().split() == ["cat-config", "--no-pager", "systemd/system.conf"]


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        ("/", "mount", "-.mount"),
        ("/srv//images/", "mount", "srv-images.mount"),
        ("/srv/vm images", "mount", "srv-vm\\x20images.mount"),
        ("/mnt/a-b", "mount", "mnt-a\\x2db.mount"),
        ("/.hidden/.x", "mount", "\\x2ehidden-.x.mount"),
        ("/mnt/\u00fc", "mount", "mnt-\\xc3\\xbc.mount"),
        ("/dev/disk/by-id/wwn-0x5:1", "device", "dev-disk-by\\x2did-wwn\\x2d0x5:1.device"),
    ],
)
def test_a_unit_is_named_after_its_path_as_systemd_escape_does(path: str, kind: str, name: str) -> None:
    assert units.unit_name(path, kind) == name


def test_what_a_guest_waits_for_is_mounts_on_the_way_and_its_devices() -> None:
    lacking = of_systemd().lacking(
        ["/srv/vm images/web1.qcow2", "/mnt/pmem/web1", "/mnt/backups"], ["/dev/vg/web1", "/dev/vg/web2"], ["tap1", "tap2"]
    )
    assert lacking == [
        "srv-vm\\x20images.mount",
        "srv.mount",
        "dev-vg-web2.device",
        "sys-subsystem-net-devices-tap2.device",
    ]


def test_a_promise_leaves_the_next_boot_what_the_guests_memory_needs_and_a_withdrawal_nothing(tmp_path: Path) -> None:
    kexec = SystemdKexec(FakeSystemd(), tmp_path, tmp_path)  # type: ignore[arg-type]
    kexec.promise({"nd_pmem", "device_dax"}, Survives.KEXEC)
    assert {"nd_pmem", "device_dax"} <= set((tmp_path / "early").read_text().splitlines())
    kexec.withdraw()
    assert not (tmp_path / "early").exists()


# -- the unit that starts the agent early ---------------------------------------------------------------------------------

BOOTS = "12 cpr-load.service start waiting"
APPARMOR = f"{BOOTS}\n13 apparmor.service start running"
LOADER = "proc/sys/kernel/bootloader_type"
LEFT = "var/lib/cpr-agent/early"
HOST = {
    LEFT: "nd_pmem\n; reboot\n",
    LOADER: "209",
    "sys/module/apparmor/parameters/enabled": "Y",
    "etc/apparmor.d/cpr-vm.web1.vm": "",
    "etc/apparmor.d/cpr-agentd.dpkg-dist": "",
    "run/motd": "",
}
"""What a kexec has left, and what units/start-early looks at."""


def started_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str, host: Mapping[str, str] = HOST, parser: int = 0
) -> list[str]:
    """Run units/start-early on a ``host`` where PID 1 has these ``jobs``, and apparmor_parser ends with ``parser``; returns
    the commands that it has run."""
    ran, tools, text = tmp_path / "ran", tmp_path / "tools", (ROOT / "units/start-early").read_text()
    for path in ("/var/lib/cpr-agent", "/proc/", "/sys/module", "/etc/apparmor.d", "/run/"):
        text = text.replace(path, f"{tmp_path}{path}")
    for path, words in host.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(words)
    tools.mkdir()
    script(tools / "systemctl", f'[ "$1" = list-jobs ] && echo "{jobs}" || echo "systemctl $*" >>{ran}')
    script(tools / "modprobe", f'echo "modprobe $*" >>{ran}')
    script(tools / "systemd-tmpfiles", f'echo "systemd-tmpfiles $*" >>{ran}')
    script(tools / "apparmor_parser", f'echo "apparmor_parser $*" >>{ran}; exit {parser}')
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    text = text.replace("/usr/libexec/cpr-agent/renew-early", script(tmp_path / "renew", "true"))
    subprocess.run(["sh", "-c", text], check=False)
    assert not (tmp_path / LEFT).exists(), "each boot has its own"
    return ran.read_text().replace(f"{tmp_path}/", "/").splitlines() if ran.exists() else []


STARTS = "systemctl start --no-block --job-mode=ignore-dependencies cpr-agent.service cpr-save.service"


def test_the_agent_starts_early_with_its_modules_and_with_what_saves_for_a_kexec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = "systemd-tmpfiles --create --prefix=/dev/kvm --prefix=/dev/vhost-net --prefix=/dev/vhost-vsock"
    assert started_early(tmp_path, monkeypatch, BOOTS) == ["modprobe --all --quiet dax nd_pmem", opened, STARTS]


@pytest.mark.parametrize(
    ("jobs", "host"),
    [
        ("12 rescue.service start running", HOST),
        ("12 cpr-load.service stop waiting", HOST),
        ("", HOST),
        (BOOTS, {**HOST, LOADER: "114"}),
        (BOOTS, {**HOST, "proc/vmcore": ""}),
    ],
    ids=["rescue", "on its way down", "no jobs", "no kexec", "crash dump"],
)
def test_no_guest_is_part_of_another_boot(
    jobs: str, host: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started_early(tmp_path, monkeypatch, jobs, host) == []


def test_profiles_are_loaded_first_and_no_copy_that_an_admin_or_dpkg_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = " ".join(f"/etc/apparmor.d/cpr-{name}" for name in ("agentd", "vm", "vm.web1.vm"))
    assert started_early(tmp_path, monkeypatch, APPARMOR)[2:] == [
        f"apparmor_parser --replace --write-cache {names}",
        STARTS,
    ]


def test_no_guest_goes_on_early_without_the_profiles_that_it_is_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert STARTS not in started_early(tmp_path, monkeypatch, APPARMOR, parser=1)


# -- the gate -------------------------------------------------------------------------------------------------------------

GATE_KEXEC, GATE_SOFT = ("12 kexec.target start waiting", "13 systemd-soft-reboot.service start running")
BOOT_ID = "5b1e"


def on_the_way_down(
    root: Path, program: str, jobs: str, *asked: str, promise: str = "", version: int = 257
) -> tuple[int, str]:
    """Run units/gate or units/save-before-kexec on a host that has launched a VM; systemd has these ``jobs``. Returns the
    exit status, and what was said or asked of cprctl."""
    tools, text = root / "tools", (ROOT / "units" / program).read_text()
    for path, words in (
        ("proc/sys/kernel/random/boot_id", BOOT_ID),
        ("run/cpr-agent/launched/web1.json", ""),
        *([("run/cpr-agent/kexec-ready", promise)] if promise else []),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{words}\n")
    for path in ("/run/cpr-agent/", "/run/nextroot", "/proc/sys"):
        text = text.replace(path, f"{root}{path}")
    tools.mkdir(exist_ok=True)
    says = f'case $1 in list-jobs) echo "{jobs}" ;; --version) echo "systemd {version} ({version}.1)" ;; esac'
    script(tools / "systemctl", says)
    gate = script(tools / "gate", f'[ "${{1:-}}" = wanted ] && cat {root}/wanted')
    text = text.replace("/usr/libexec/cpr-agent/gate", gate).replace("/usr/bin/cprctl", "echo cprctl")
    found = {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text, program, *asked], check=False, capture_output=True, env=found, text=True)
    return done.returncode, done.stdout.strip()


def passes(root: Path, jobs: str, promise: str = "") -> bool:
    return on_the_way_down(root, "gate", jobs, promise=promise)[0] == 0


@pytest.mark.parametrize(
    ("jobs", "promise", "passed"),
    [
        (GATE_KEXEC, "", False),
        (GATE_KEXEC, BOOT_ID, True),
        (GATE_KEXEC, f"{BOOT_ID} kexec", True),
        (GATE_KEXEC, f"{BOOT_ID} soft-reboot", False),
        (GATE_KEXEC, "another kexec", False),
        (GATE_SOFT, "", False),
        (GATE_SOFT, f"{BOOT_ID} kexec", True),
        (GATE_SOFT, f"{BOOT_ID} soft-reboot", True),
        (f"{GATE_SOFT}\n{GATE_KEXEC}", f"{BOOT_ID} soft-reboot", False),
        ("", f"{BOOT_ID} soft-reboot", False),
        ("", f"{BOOT_ID} kexec", True),
    ],
)
def test_the_gate_passes_what_was_promised_and_nothing_that_takes_more(
    jobs: str, promise: str, *, passed: bool, tmp_path: Path
) -> None:
    assert passes(tmp_path, jobs, promise) is passed


@pytest.mark.parametrize("kind", ["kexec", "soft-reboot"])
def test_the_gate_passes_no_saved_guest_into_a_root_that_does_not_know_it(kind: str, tmp_path: Path) -> None:
    """It may have come after the save."""
    (tmp_path / "run/nextroot/usr").mkdir(parents=True)
    assert not passes(tmp_path, GATE_SOFT, f"{BOOT_ID} {kind}")
    assert not passes(tmp_path, f"{GATE_SOFT}\n{GATE_KEXEC}", f"{BOOT_ID} {kind}")
    assert passes(tmp_path, GATE_KEXEC, f"{BOOT_ID} kexec"), "the next kernel mounts its own"


def test_the_gate_passes_a_soft_reboot_for_which_guests_are_shut_down_and_no_kexec(tmp_path: Path) -> None:
    (tmp_path / "run/nextroot/usr").mkdir(parents=True)
    (tmp_path / "run/cpr-agent").mkdir()
    (tmp_path / "run/cpr-agent/shut-down").touch()
    assert passes(tmp_path, GATE_SOFT)
    assert not passes(tmp_path, f"{GATE_SOFT}\n{GATE_KEXEC}")


@pytest.mark.parametrize(
    ("jobs", "wanted"),
    [("", ""), (GATE_SOFT, "soft-reboot"), (GATE_KEXEC, "kexec"), (f"{GATE_SOFT}\n{GATE_KEXEC}", "kexec")],
)
def test_a_kexec_and_a_soft_reboot_are_told_from_each_other(jobs: str, wanted: str, tmp_path: Path) -> None:
    assert on_the_way_down(tmp_path, "gate", jobs, "wanted") == (0, wanted)


@pytest.mark.parametrize(
    ("wanted", "version", "nextroot", "saved"),
    [
        ("kexec", 257, False, True),
        ("kexec", 254, True, True),
        ("soft-reboot", 257, False, True),
        ("soft-reboot", 255, False, False),
        ("soft-reboot", 257, True, False),
        ("", 257, False, False),
    ],
)
def test_guests_are_saved_where_the_next_agent_will_know_of_them(
    wanted: str, version: int, *, nextroot: bool, saved: bool, tmp_path: Path
) -> None:
    (tmp_path / "wanted").write_text(wanted)
    if nextroot:
        (tmp_path / "run/nextroot/usr").mkdir(parents=True)
    assert on_the_way_down(tmp_path, "save-before-kexec", "", version=version) == (
        (0, "cprctl save --all --before-kexec" if saved else "")
    )
    assert (tmp_path / "run/cpr-agent/shut-down").exists() == (bool(wanted) and not saved), "the gate is to know"


# -- how the unit of a VM stops -------------------------------------------------------------------------------------------


def shut_down_by(run_dir: Path, place: str) -> list[str]:
    """Run what cpr-vm@.service runs as it stops; returns the arguments of the program that it starts, if it starts one."""
    unit = (ROOT / "units/cpr-vm@.service").read_text().replace("\\\n", "")
    (command,) = (line.removeprefix("ExecStop=-") for line in unit.splitlines() if line.startswith("ExecStop="))
    python, asked = run_dir / "python3", run_dir / "asked"
    script(python, f'echo "$@" >{asked}')
    command = command.replace("/usr/bin/python3", str(python)).replace("/run/cpr-agent", str(run_dir)).replace("%i", place)
    subprocess.run(shlex.split(command), check=True)
    return asked.read_text().split() if asked.exists() else []


def test_a_saved_guest_s_qemu_is_ended_without_a_word_while_the_promise_stands(tmp_path: Path) -> None:
    for place in ("web1", "web2:b", "web3"):
        (tmp_path / "tickets" / place).mkdir(parents=True)
    one = kexec(257, tmp_path)
    one.end_at_once([f"{tmp_path}/vm/web1", f"{tmp_path}/vm/web2:b", f"{tmp_path}/vm/never-started"])
    assert shut_down_by(tmp_path, "web1") == shut_down_by(tmp_path, "web2:b") == []
    assert shut_down_by(tmp_path, "web3")[-2:] == [f"{tmp_path}/vm/web3", "90"], "it is not saved"
    one.withdraw()
    assert shut_down_by(tmp_path, "web1")[-2:] == [f"{tmp_path}/vm/web1", "90"]

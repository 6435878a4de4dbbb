# SPDX-License-Identifier: GPL-2.0-or-later
"""host-vm: a throw-away virtual KVM host (Debian 13, emulated, with NVDIMM and nested KVM) in which tests kexec.

exit codes: 0 done, or the verdict is pass; 1 the verdict is fail; 2 the harness could not run; 3 timeout; 4 the host
VM ended without a verdict; 5 it stood still
"""

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from .image import HostVmError, build_image, find_image, image_key, say
from .newer_kernel import newer_kernel
from .qemu import qemu_wrapper
from .vm import Outcome, RunRequest, RunResult, run_host_vm

EXIT_CODES = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.TIMEOUT: 3, Outcome.CRASH: 4, Outcome.STILL: 5}
TAIL_LINES = 40


def main() -> int:
    """Parses the command line and runs one subcommand; returns the exit code."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that QEMU ends and scratch files go
    try:
        return int(arguments.act(arguments))
    except HostVmError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="host-vm", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("build", help="build the image, unless it is in the cache").set_defaults(act=_build)
    commands.add_parser("root", help="print the path of the root directory").set_defaults(act=_root)
    commands.add_parser("key", help="print the image's cache key").set_defaults(act=_key)
    wrapper = commands.add_parser("qemu-wrapper", help="print the path of a QEMU 10 that runs on this machine")
    wrapper.set_defaults(act=_qemu_wrapper)
    wrapper.add_argument("--newer", action="store_true", help="of the newer QEMU that Debian has for it")

    newer = "print the path of a newer kernel, for --disk; a scenario unpacks it into /"
    commands.add_parser("newer-kernel", help=newer).set_defaults(act=_newer_kernel)

    run = commands.add_parser("run", help="run a scenario; its verdict is the exit code")
    run.set_defaults(act=_run)
    run.add_argument("--scenario", type=Path, required=True, help="what runs inside, in each boot")
    run.add_argument("--payload", type=Path, nargs="+", default=[], help="files and directories for the scenario")
    debs = "packages to install in the first boot; may be repeated"
    run.add_argument("--deb", type=Path, nargs="+", action="extend", default=[], help=debs)
    run.add_argument("--out", type=Path, help="where logs and artefacts go (default: a new directory in /tmp)")
    run.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds (default: %(default)s)")
    run.add_argument("--memory", default="4G", help="default: %(default)s")
    run.add_argument("--nvdimm", default="1G", help="size of the persistent memory (default: %(default)s)")
    run.add_argument("--labelled-nvdimm", default="0", metavar="SIZE", help="a second NVDIMM, which has labels")
    run.add_argument("--virtio-pmem", default="0", metavar="SIZE", help="persistent memory of virtio, too")
    more = "another disk for the host VM, raw and read-only, there as /dev/disk/by-id/virtio-NAME"
    run.add_argument("--disk", type=_disk, action="append", default=[], metavar="NAME=FILE", help=more)
    run.add_argument("--smp", type=int, default=2, help="default: %(default)s")
    run.add_argument("--kernel", choices=("cloud", "generic"), default="cloud", help="default: %(default)s")
    run.add_argument("--append", default="", metavar="WORDS", help="more words for the kernel's command line")
    run.add_argument("--follow", action="store_true", help="show the scenario's output")
    run.add_argument("--allow-reboot", action="store_true", help="a reset boots again; without it, it ends the run")
    port = "a network card; PORT of 127.0.0.1 leads to its port INSIDE"
    run.add_argument("--port", type=_port, metavar="PORT:INSIDE", help=port)
    run.add_argument("--power-cuts", action="store_true", help="the scenario may ask for them; disks keep what is flushed")
    run.add_argument("--seed", type=int, help="of the cuts' random instants (default: random)")
    return parser


def _build(_: argparse.Namespace) -> int:
    build_image()
    return 0


def _root(_: argparse.Namespace) -> int:
    print(find_image().root)
    return 0


def _key(_: argparse.Namespace) -> int:
    print(image_key())
    return 0


def _qemu_wrapper(arguments: argparse.Namespace) -> int:
    print(qemu_wrapper(find_image().entry, newer=arguments.newer))
    return 0


def _newer_kernel(_: argparse.Namespace) -> int:
    print(newer_kernel())
    return 0


def _run(arguments: argparse.Namespace) -> int:
    for path in [arguments.scenario, *arguments.payload, *arguments.deb, *dict(arguments.disk).values()]:
        if not path.exists():
            raise HostVmError(f"no such file: {path}")
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="host-vm-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    request = RunRequest(
        scenario=arguments.scenario,
        out=out,
        payload=arguments.payload,
        debs=arguments.deb,
        timeout_s=arguments.timeout,
        memory=arguments.memory,
        nvdimm=arguments.nvdimm,
        labelled_nvdimm=arguments.labelled_nvdimm,
        virtio_pmem=arguments.virtio_pmem,
        disks={name: path.absolute() for name, path in arguments.disk},
        smp=arguments.smp,
        kernel=arguments.kernel,
        append=arguments.append,
        follow=arguments.follow,
        allow_reboot=arguments.allow_reboot,
        port=arguments.port,
        cut_seed=_cut_seed(arguments),
    )
    image = find_image()
    with image.in_use(), tempfile.TemporaryDirectory(prefix=".run-", dir=out) as scratch:
        result = run_host_vm(image, request, Path(scratch))
    _report(request, result)
    return EXIT_CODES[result.outcome]


def _disk(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name.isalnum() and equals and path):
        raise argparse.ArgumentTypeError(f"not NAME=FILE: {text}")
    return name, Path(path)


def _port(text: str) -> tuple[int, int]:
    outside, colon, inside = text.partition(":")
    if not (outside.isdigit() and colon and inside.isdigit()):
        raise argparse.ArgumentTypeError(f"not PORT:INSIDE: {text}")
    return int(outside), int(inside)


def _cut_seed(arguments: argparse.Namespace) -> int | None:
    if not arguments.power_cuts:
        return None
    return random.SystemRandom().randrange(1 << 32) if arguments.seed is None else int(arguments.seed)


def _report(request: RunRequest, result: RunResult) -> None:
    if result.outcome is not Outcome.PASS:
        for name in ("qemu.log", "console.log", *(() if request.follow else ("scenario.log",))):
            path = request.out / name
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            if lines:
                print(f"--- the end of {path}", *lines[-TAIL_LINES:], sep="\n")
    told = {
        Outcome.PASS: "pass",
        Outcome.FAIL: "fail",
        Outcome.TIMEOUT: f"fail: no verdict within {request.timeout_s:.0f} s",
        Outcome.CRASH: "fail: QEMU ended without a verdict (reset, power-off, panic or crash)",
    }[result.outcome]
    seen = f"{result.boots} boots" if request.cut_seed is None else f"{result.boots} boots and {result.cuts} power cut(s)"
    print(f"host VM: {told} after {seen}, {result.duration_s:.0f} s; see {request.out}", flush=True)

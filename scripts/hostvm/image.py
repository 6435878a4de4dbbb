# SPDX-License-Identifier: GPL-2.0-or-later
"""The host VM's root directory and disk image, built once and cached by what goes into them.

A cache entry is `host-KEY/` with `root/` (which QEMU, kernels and modules for guests come from too), `base.img`, and
`newer/`, the newer QEMU for this machine. It is built as `host-KEY.partial/` and renamed at the end: an entry without
that suffix is complete. Everything happens under a lock; an entry that a running host VM uses is locked too and outlives
its replacement.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = Path(__file__).parent / "image"
SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"
"""Where a newer QEMU comes from: its packages are in the image, not installed, and unpacked beside the root."""
IMAGE_SIZE = "8G"  # sparse; about 2 GB are in use
NEEDED_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "tar": "tar",
}
# Not unpacked at all: what no test reads, drivers of hardware that no VM has, and the hook that builds an initrd.
# customize makes smaller initrds, and removes these options from the result again.
MODULES = "/usr/lib/modules/*/kernel"
LEFT_OUT = (
    "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*",
    "/etc/kernel/postinst.d/initramfs-tools",
    f"{MODULES}/sound/*",
    *(f"{MODULES}/drivers/{name}/*" for name in (
        "accel", "ata", "bluetooth", "comedi", "gpu", "hid", "hwmon", "iio", "infiniband", "input", "isdn", "leds",
        "md", "media", "message", "mfd", "mmc", "mtd", "nvme", "pinctrl", "platform", "power", "regulator", "rtc",
        "scsi", "staging", "target", "thunderbolt", "usb", "video", "watchdog",
    )),
    *(f"{MODULES}/drivers/net/{name}/*" for name in ("can", "dsa", "ethernet", "phy", "usb", "wireless", "wwan")),
)  # fmt: skip


class HostVmError(Exception):
    """What went wrong and what to do about it, in one line for the terminal."""


class Image:
    """A complete cache entry."""

    def __init__(self, entry: Path) -> None:
        self.entry = entry
        self.root = entry / "root"
        self.base = entry / "base.img"

    def kernel(self, flavour: str) -> tuple[Path, Path]:
        """The newest kernel of a flavour ("cloud" or "generic") and its initrd."""
        cloud = flavour == "cloud"
        found = [k for k in (self.root / "boot").glob("vmlinuz-*") if k.name.endswith("-cloud-amd64") == cloud]
        if not found:
            raise HostVmError(f"no {flavour} kernel in {self.root}/boot")
        newest = max(found, key=lambda k: [int(n) if n.isdigit() else 0 for n in k.name.replace("-", ".").split(".")])
        return newest, newest.with_name(newest.name.replace("vmlinuz", "initrd.img"))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the entry from being removed while a host VM runs from it."""
        with (self.entry / "in-use").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield


def cache_directory() -> Path:
    """$CPR_AGENT_CACHE, or ~/.cache/cpr-agent."""
    chosen = os.environ.get("CPR_AGENT_CACHE")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "cpr-agent"


def image_key() -> str:
    """A hash of everything that decides what the image contains: the recipe's files and this module."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(p for p in RECIPE.rglob("*") if p.is_file())]:
        executable = path.stat().st_mode & 0o100
        digest.update(f"{path.relative_to(RECIPE.parent)}\0{executable}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_image() -> Image:
    """The image for this recipe; raises HostVmError if it has not been built."""
    entry = cache_directory() / f"host-{image_key()}"
    if not entry.is_dir():
        raise HostVmError("the host VM's image is not built; run: scripts/host-vm build")
    return Image(entry)


def build_image() -> Image:
    """Builds the image unless the cache has it; two callers at once build it once."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    entry = cache / f"host-{image_key()}"
    with (cache / "host-vm.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another host-vm build is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not entry.is_dir():
            _build(cache, entry)
            _remove_others(cache, entry)
        _point(cache / "host-root", entry / "root")
    return Image(entry)


def say(text: str) -> None:
    """A line of progress. On stderr: stdout is for answers."""
    print(f"host-vm: {text}", file=sys.stderr, flush=True)


def _build(cache: Path, entry: Path) -> None:
    _check_tools()
    partial = cache / f"{entry.name}.partial"
    for leftover in cache.glob("host-*.partial"):
        _remove_tree(leftover)
    partial.mkdir()
    with _step(f"Debian {SUITE} root directory (mmdebstrap)", partial / "mmdebstrap.log") as log:
        _run_logged(_mmdebstrap_command(partial / "root"), log)
    for package in sorted((partial / "root/var/cache/qemu-backports").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, partial / "newer"], check=True)
    with _step(f"disk image of {IMAGE_SIZE}, sparse (mke2fs)", partial / "mke2fs.log") as log:
        _run_logged(_mke2fs_command(partial / "root", partial / "base.img"), log)
    partial.rename(entry)


def _mmdebstrap_command(root: Path) -> list[str]:
    return [
        # In namespaces of its own: when this program is killed, no process and no mount is left.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(_packages())}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--aptopt={option}" for option in _apt_options()),
        "--skip=cleanup/reproducible",  # it would empty /etc/machine-id: every boot a journal of its own
        f'--customize-hook="{RECIPE}/newer-qemu" "$1" {BACKPORTS}',
        f'--customize-hook="{RECIPE}/customize" "$1"',
        SUITE,
        str(root),
        *_sources(),
    ]


def _mke2fs_command(root: Path, image: Path) -> list[str]:
    lazy = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
    # Without checksums, which cost time in emulation.
    return ["mke2fs", "-q", "-t", "ext4", "-L", "host-vm", "-m", "0", "-O", "^metadata_csum,^metadata_csum_seed",
            "-E", lazy, "-d", str(root), str(image), IMAGE_SIZE]  # fmt: skip


def _packages() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (RECIPE / "packages").read_text().splitlines())
    return [line for line in lines if line]


def _sources() -> list[str]:
    mirrors = _mirrors()
    if "Debian" not in mirrors:
        raise HostVmError("apt on this machine has no source for Debian packages; the host VM's come from the same place")
    sources = [f"deb {mirrors['Debian']} {suite} main" for suite in (SUITE, f"{SUITE}-updates", BACKPORTS)]
    if "Debian-Security" in mirrors:
        sources.append(f"deb {mirrors['Debian-Security']} {SUITE}-security main")
    return sources


def _mirrors() -> dict[str, str]:
    """Label to address of the Debian mirrors that this machine's apt uses."""
    template = "$(REPO_URI) $(ORIGIN) $(LABEL)"
    command = ["apt-get", "indextargets", "--format", template, "Created-By: Packages", "Origin: Debian"]
    found: dict[str, str] = {}
    for line in subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines():
        uri, _, label = line.split(" ", 2)
        if uri.startswith(("http://", "https://")):
            found.setdefault(label, uri)
    return found


def _apt_options() -> list[str]:
    """How this machine's apt reaches a mirror; mmdebstrap does not read the machine's apt.conf."""
    wanted = ("Acquire::http::Proxy ", "Acquire::https::Proxy ", "Acquire::Check-Valid-Until ", "Acquire::Check-Date ")
    dump = subprocess.run(["apt-config", "dump"], check=False, capture_output=True, text=True).stdout
    return ['Acquire::Languages "none"', *(x.rstrip(";") for x in dump.splitlines() if x.startswith(wanted))]


def _check_tools() -> None:
    if os.geteuid() != 0:
        raise HostVmError("building the image needs root")
    search = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
    missing = {p for tool, p in NEEDED_TOOLS.items() if not any((Path(d) / tool).exists() for d in search)}
    if not list(Path("/usr/share/keyrings").glob("debian-archive-keyring.*")):
        missing.add("debian-archive-keyring")
    if missing:
        raise HostVmError(f"missing on this machine; run: apt-get install {' '.join(sorted(missing))}")


@contextmanager
def _step(title: str, log: Path) -> Iterator[Path]:
    say(f"building the {title}")
    start = time.monotonic()
    try:
        yield log
    except subprocess.CalledProcessError as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise HostVmError(f"this step failed with {error.returncode}; the end of {log}:\n{tail}") from error
    say(f"  done in {time.monotonic() - start:.0f} s")


def _run_logged(command: list[str], log: Path) -> None:
    # Without SOURCE_DATE_EPOCH, by which mmdebstrap would date files: the image is not meant to be reproducible.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    environment |= {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    with log.open("wb") as output:
        subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _point(link: Path, target: Path) -> None:
    fresh = link.with_name(link.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.rename(link)


def _remove_others(cache: Path, keep: Path) -> None:
    for other in cache.glob("host-*"):
        if other == keep or not other.is_dir() or other.is_symlink():
            continue
        with (other / "in-use").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove_tree(other)


def _remove_tree(tree: Path) -> None:
    # Never through a mount: a build that was killed may have left /proc or /dev mounted inside.
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=True)

"""Kernels: which are installed, what speaks against them, and what kexec says."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.errors import KernelRefused
from cpr_agent.host.kernels import InstalledKernels, version_key

DRIVERS = {"device_dax", "dax_pmem", "nd_pmem", "libnvdimm", "nfit"}
VERSION = "6.12.9-amd64"
CONFIG = """\
CONFIG_64BIT=y
CONFIG_ACPI_NFIT=m
CONFIG_LIBNVDIMM=m
CONFIG_BLK_DEV_PMEM=m
CONFIG_DEV_DAX=m
CONFIG_DEV_DAX_PMEM=y
# CONFIG_VIRTIO_PMEM is not set
"""
DEPENDS = """\
kernel/drivers/acpi/nfit/nfit.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/nvdimm/libnvdimm.ko.xz:
kernel/drivers/nvdimm/nd_pmem.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/dax/device-dax.ko.xz:
"""
KEXEC = """\
#!/bin/sh
printf '%s\\n' "$@" >{root}/called
case $1 in --load) echo 1 ;; *) echo 0 ;; esac >{root}/sys/kernel/kexec_loaded
"""


def bzimage(protocol: int = 0x20F, loadflags: int = 1, xloadflags: int = 3, magic: bytes = b"HdrS") -> bytes:
    image = bytearray(2048)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, protocol)
    image[0x211] = loadflags
    struct.pack_into("<H", image, 0x236, xloadflags)
    return bytes(image)


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with one good kernel."""
    write(tmp_path / f"boot/vmlinuz-{VERSION}", bzimage())
    write(tmp_path / f"boot/initrd.img-{VERSION}", b"070701" + bytes(100))
    write(tmp_path / f"boot/config-{VERSION}", CONFIG)
    modules = tmp_path / "usr/lib/modules" / VERSION
    write(modules / "modules.dep", DEPENDS)
    write(modules / "modules.builtin", "kernel/drivers/dax/dax.ko\n")
    for line in DEPENDS.splitlines():
        write(modules / line.partition(":")[0])
    write(tmp_path / "proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{VERSION} root=/dev/vda1 ro memmap=4G!8G\n")
    write(tmp_path / "proc/self/mountinfo", mounted("/dev/vda1"))
    write(tmp_path / "proc/sys/kernel/kexec_load_disabled", "0\n")
    write(tmp_path / "proc/sys/kernel/kexec_load_limit_reboot", "-1\n")
    write(tmp_path / "sys/kernel/kexec_loaded", "0\n")
    write(tmp_path / "sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    return tmp_path


def mounted(source: str, at: str = "/") -> str:
    return f"1 0 254:1 / / rw - ext4 /dev/vda2 rw\n22 1 254:1 / {at} rw,relatime shared:1 - ext4 {source} rw\n"


def the_kernel(root: Path) -> Kernel:
    return InstalledKernels(root).installed()[0]


def findings(root: Path, drivers: set[str] = DRIVERS, kernel: Kernel | None = None) -> list[Finding]:
    return InstalledKernels(root).findings(kernel or the_kernel(root), drivers)


def codes(root: Path, drivers: set[str] = DRIVERS) -> list[str]:
    return [finding.code for finding in findings(root, drivers)]


# -- which there are --------------------------------------------------------------------------------------------------


def test_versions_are_ordered_as_people_read_them() -> None:
    versions = ["6.9", "6.12-rc1", "6.12-rc2", "6.12", "6.12.9", "6.12.10", "6.12.10+deb13", "6.100"]
    assert sorted(set(versions), key=version_key) == versions
    assert version_key("6.12~rc6-amd64") < version_key("6.12-amd64") < version_key("6.12.0-amd64")


def test_kernels_are_listed_newest_first_with_their_files(root: Path) -> None:
    write(root / "boot/vmlinuz-6.12.10-amd64")
    assert InstalledKernels(root).installed() == [
        Kernel(version="6.12.10-amd64", image=f"{root}/boot/vmlinuz-6.12.10-amd64"),
        Kernel(
            version=VERSION,
            image=f"{root}/boot/vmlinuz-{VERSION}",
            initrd=f"{root}/boot/initrd.img-{VERSION}",
            config=f"{root}/boot/config-{VERSION}",
        ),
    ]


def test_a_kernel_of_fedora_is_found_where_its_package_put_it(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules/6.16.3-200.fc42.x86_64"
    image, config = write(modules / "vmlinuz"), write(modules / "config")
    initrd = write(tmp_path / "boot/initramfs-6.16.3-200.fc42.x86_64.img")
    found = the_kernel(tmp_path)
    assert (found.version, found.image, found.initrd) == ("6.16.3-200.fc42.x86_64", str(image), str(initrd))
    assert found.config == str(config)
    copy = write(tmp_path / "boot/vmlinuz-6.16.3-200.fc42.x86_64")
    assert [kernel.image for kernel in InstalledKernels(tmp_path).installed()] == [str(copy)]


@pytest.mark.parametrize(
    "version",
    ["6.12.9-amd64.old", "6.12.9.dpkg-new", "6.12.9-x.dpkg-bak", "6.12.9.rpmsave", "6.12.9~", "0-rescue-1f", "linux"],
)
def test_leftovers_are_no_kernels(root: Path, version: str) -> None:
    write(root / f"boot/vmlinuz-{version}")
    assert [kernel.version for kernel in InstalledKernels(root).installed()] == [VERSION]


def test_the_command_line_is_given_without_the_boot_loader(root: Path) -> None:
    assert InstalledKernels(root).command_line() == "root=/dev/vda1 ro memmap=4G!8G"


# -- what speaks against one ------------------------------------------------------------------------------------------


def test_nothing_speaks_against_a_good_kernel(root: Path) -> None:
    assert findings(root) == []


def test_nothing_speaks_against_the_kernels_of_debian() -> None:
    command = [f"{Path(__file__).parents[2]}/scripts/host-vm", "root"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("scripts/host-vm root: there is no image of the host VM")
    root = Path(shown.stdout.strip())
    kernels = InstalledKernels(root).installed()
    if not kernels:
        pytest.skip(f"{root} has no kernels")
    assert {kernel.version: InstalledKernels(root).findings(kernel, DRIVERS) for kernel in kernels} == {
        kernel.version: [] for kernel in kernels
    }
    nameless = [replace(kernel, version="", config="") for kernel in kernels]
    assert [InstalledKernels(root).findings(kernel, DRIVERS) for kernel in nameless] == [[] for _ in kernels]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "is empty"),
        (b"MZ" + bytes(2000), "is not a bzImage"),
        (bzimage(magic=b"HdrT"), "is not a bzImage"),
        (bzimage()[:700], "is not a bzImage"),
        (bzimage(protocol=0x20B), "speaks boot protocol 2.11, and a kexec needs 2.12"),
        (bzimage(loadflags=0), "is not a 64-bit bzImage"),
        (bzimage(xloadflags=2), "is not a 64-bit bzImage"),
        (bzimage(xloadflags=1), "can't be loaded above 4 GiB"),
    ],
)
def test_an_image_that_kexec_would_not_take_is_an_error(
    root: Path, image: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: type("uname", (), {"machine": "x86_64"}))
    (root / f"boot/vmlinuz-{VERSION}").write_bytes(image)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "kernel-image")
    assert finding.what.endswith(said)


@pytest.mark.parametrize(
    ("path", "said"),
    [("/nonexistent", "can't be read: No such file or directory"), ("/dev/null", "is not a regular file")],
)
def test_a_file_that_is_missing_or_no_file_is_an_error(root: Path, path: str, said: str) -> None:
    kernel = the_kernel(root)
    for bad, code in (replace(kernel, image=path), "kernel-image"), (replace(kernel, initrd=path), "initrd"):
        (finding,) = findings(root, kernel=bad)
        assert (finding.severity, finding.code) == ("error", code)
        assert finding.what.endswith(said)


@pytest.mark.parametrize(
    "head", [b"070701", b"\x1f\x8b", b"\xfd7zXZ", b"\x5d\0\0", b"BZh9", b"\x02!L\x18", b"\x89LZO", b"\x28\xb5/\xfd"]
)
def test_an_initrd_of_any_kind_is_fine(root: Path, head: bytes) -> None:
    (root / f"boot/initrd.img-{VERSION}").write_bytes(head + bytes(100))
    assert findings(root) == []


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (bytes(512), "is neither a cpio archive nor compressed")])
def test_a_broken_initrd_is_an_error(root: Path, content: bytes, said: str) -> None:
    (root / f"boot/initrd.img-{VERSION}").write_bytes(content)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "initrd")
    assert said in finding.what


def test_a_kernel_without_an_initrd_is_a_warning(root: Path) -> None:
    (root / f"boot/initrd.img-{VERSION}").unlink()
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("warning", "initrd-none")


@pytest.mark.parametrize(("name", "value"), [("kexec_load_disabled", "1\n"), ("kexec_load_limit_reboot", "0\n")])
def test_a_boot_that_takes_no_kernel_is_an_error(root: Path, name: str, value: str) -> None:
    write(root / "proc/sys/kernel" / name, value)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "kexec-disabled")


def test_lockdown_is_a_warning(root: Path) -> None:
    write(root / "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("warning", "lockdown")


def test_a_driver_that_was_not_built_is_an_error(root: Path) -> None:
    (finding,) = findings(root, {"virtio_pmem", "nfit"})
    assert (finding.severity, finding.code) == ("error", "driver-not-configured")
    assert finding.what == f"kernel {VERSION} lacks the driver virtio_pmem: it was built without CONFIG_VIRTIO_PMEM"


def test_a_driver_that_another_package_holds_is_an_error(root: Path) -> None:
    write(root / f"usr/lib/modules/{VERSION}/modules.dep", "".join(DEPENDS.splitlines(keepends=True)[:2]))
    assert codes(root) == ["driver-not-installed", "driver-not-installed"]
    assert {"device_dax.ko", "nd_pmem.ko"} == {finding.what.split()[-4] for finding in findings(root)}


def test_a_module_or_one_that_it_needs_must_be_there_as_a_file(root: Path) -> None:
    (root / f"usr/lib/modules/{VERSION}/kernel/drivers/nvdimm/libnvdimm.ko.xz").unlink()
    assert codes(root, {"nfit"}) == ["driver-not-installed"]
    assert codes(root, {"device_dax"}) == []


def test_modules_are_needed_where_the_config_says_so(root: Path) -> None:
    (root / f"usr/lib/modules/{VERSION}/modules.dep").unlink()
    assert codes(root, {"dax_pmem"}) == []
    assert codes(root, {"dax_pmem", "nfit"}) == ["driver-not-installed"]


def test_without_a_config_the_modules_are_looked_at(root: Path) -> None:
    (root / f"boot/config-{VERSION}").unlink()
    assert codes(root, {"nfit", "dax"}) == []
    assert codes(root, {"virtio_pmem"}) == ["driver-not-installed"]


def test_without_config_and_modules_one_warning_says_so(root: Path) -> None:
    (root / f"boot/config-{VERSION}").unlink()
    (root / f"usr/lib/modules/{VERSION}/modules.dep").unlink()
    (finding,) = findings(root, {"nfit", "nd_pmem"})
    assert (finding.severity, finding.code) == ("warning", "drivers-not-checked")
    assert finding.what.endswith("nd_pmem, nfit")


def test_an_unknown_driver_is_looked_for_among_the_modules_only(root: Path) -> None:
    write(root / f"usr/lib/modules/{VERSION}/modules.builtin", "kernel/drivers/virtio/virtio-thing.ko\n")
    assert codes(root, {"virtio_thing"}) == []
    (finding,) = findings(root, {"new_pmem"})
    assert (finding.severity, finding.code) == ("warning", "driver-not-found")


def test_a_kernel_without_a_version_is_known_by_what_its_image_says(root: Path) -> None:
    kernel = replace(the_kernel(root), version="", config="")
    assert [finding.code for finding in findings(root, kernel=kernel)] == ["drivers-not-checked"]
    image = bytearray(bzimage())
    struct.pack_into("<H", image, 0x20E, 0x300)
    image[0x500:0x580] = f"{VERSION} (somebody@example.org) #1 SMP".encode().ljust(0x80, b"\0")
    write(Path(kernel.image), bytes(image))
    (root / f"usr/lib/modules/{VERSION}/modules.builtin").write_text("kernel/drivers/dax/dax_pmem.ko\n")
    assert findings(root, kernel=kernel) == []


# -- a root file system on persistent memory --------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of our own."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    return tmp_path / "bin"


def lists_initrd(program: Path, *modules: str) -> None:
    lines = "".join(f"-rw-r--r-- 1 root usr/lib/modules/{VERSION}/kernel/x/{module}.ko.xz\n" for module in modules)
    write(program, f"#!/bin/sh\necho '{lines}'\n").chmod(0o755)


@pytest.mark.parametrize("at", ["/", "/usr"])
@pytest.mark.parametrize("program", ["lsinitramfs", "lsinitrd"])
def test_what_the_root_file_system_needs_must_be_in_the_initrd(root: Path, path: Path, program: str, at: str) -> None:
    write(root / "proc/self/mountinfo", mounted("/dev/pmem0p1", at))
    lists_initrd(path / program, "nfit", "nd_pmem", "libnvdimm")
    assert findings(root) == []
    lists_initrd(path / program, "ext4")
    found = {finding.what.split()[4]: finding.severity for finding in findings(root)}
    assert found == {"libnvdimm,": "error", "nd_pmem,": "error", "nfit,": "warning"}
    assert set(codes(root)) == {"driver-not-in-initrd"}


def test_without_a_program_that_lists_it_the_initrd_was_not_looked_at(root: Path, path: Path) -> None:
    write(root / "proc/self/mountinfo", mounted("/dev/pmem0"))
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("info", "initrd-not-looked-at")
    write(path / "lsinitramfs", "#!/bin/sh\nexit 1\n").chmod(0o755)
    assert codes(root) == ["initrd-not-looked-at"]


def test_other_file_systems_get_their_drivers_from_the_root(root: Path, path: Path) -> None:
    lists_initrd(path / "lsinitramfs")
    write(root / "proc/self/mountinfo", mounted("/dev/pmem0", at="/srv"))
    assert findings(root) == []


# -- kexec ------------------------------------------------------------------------------------------------------------


def kexec(root: Path, script: str = KEXEC, timeout_s: float = 60) -> InstalledKernels:
    program = write(root / "kexec", script.format(root=root))
    program.chmod(0o755)
    return InstalledKernels(root, str(program), timeout_s)


def test_a_kernel_is_loaded_and_unloaded(root: Path) -> None:
    kernels, kernel = kexec(root), the_kernel(root)
    assert not kernels.loaded()
    asyncio.run(kernels.load(kernel, 'root=/dev/vda1 a="b c"'))
    assert kernels.loaded()
    assert (root / "called").read_text().splitlines() == [
        "--load",
        "--kexec-file-syscall",
        kernel.image,
        f"--initrd={kernel.initrd}",
        '--command-line=root=/dev/vda1 a="b c"',
    ]
    asyncio.run(kernels.unload())
    assert not kernels.loaded()
    assert (root / "called").read_text().splitlines() == ["--unload", "--kexec-file-syscall"]


def test_a_kernel_without_an_initrd_is_loaded_without(root: Path) -> None:
    asyncio.run(kexec(root).load(replace(the_kernel(root), initrd=""), "quiet"))
    assert "--initrd" not in (root / "called").read_text()


def test_what_kexec_said_is_passed_on_with_what_to_do(root: Path) -> None:
    kernels = kexec(
        root, "#!/bin/sh\nprintf 'a\\n\\nkexec_file_load failed: Required key not available\\n' >&2\nexit 255\n"
    )
    with pytest.raises(KernelRefused, match="could not be loaded: a; kexec_file_load failed: Required key") as refused:
        asyncio.run(kernels.load(the_kernel(root), ""))
    assert refused.value.left == "no kernel is loaded for a kexec"
    assert "signed" in refused.value.remedy


def test_a_failed_load_says_that_another_kernel_is_still_loaded(root: Path) -> None:
    write(root / "sys/kernel/kexec_loaded", "1\n")
    with pytest.raises(KernelRefused, match="kexec ended with 1") as refused:
        asyncio.run(kexec(root, "#!/bin/sh\nexit 1\n").load(the_kernel(root), ""))
    assert refused.value.left == "a kexec would start the kernel that is loaded now"


def test_a_kexec_that_did_nothing_is_not_believed(root: Path) -> None:
    kernels = kexec(root, "#!/bin/sh\n")
    with pytest.raises(KernelRefused, match="but the running kernel has none"):
        asyncio.run(kernels.load(the_kernel(root), ""))
    write(root / "sys/kernel/kexec_loaded", "1\n")
    with pytest.raises(KernelRefused, match="still has one"):
        asyncio.run(kernels.unload())


def test_a_missing_kexec_is_reported(root: Path) -> None:
    with pytest.raises(KernelRefused, match="No such file or directory") as refused:
        asyncio.run(InstalledKernels(root, f"{root}/nonexistent").load(the_kernel(root), ""))
    assert refused.value.remedy == "install kexec-tools"


def test_a_kexec_that_hangs_is_ended(root: Path) -> None:
    kernels = kexec(root, "#!/bin/sh\necho $$ >{root}/pid\nexec sleep 1000\n", timeout_s=0.5)
    with pytest.raises(KernelRefused, match=r"did not end within 0\.5 s"):
        asyncio.run(kernels.unload())
    assert not Path("/proc", (root / "pid").read_text().strip()).exists()

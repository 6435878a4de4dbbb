"""The lab of tests/bus, for other guests, other memory and other QEMUs too."""

from tests.bus.conftest import any_qemu, each_lab, each_qemu, lab, linux, linux_with_agent, saved, tiny

__all__ = ["any_qemu", "each_lab", "each_qemu", "lab", "linux", "linux_with_agent", "saved", "tiny"]

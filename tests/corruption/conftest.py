# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/bus, for corruptions too."""

from tests.bus.conftest import any_qemu, each_lab, each_qemu, lab, saved, tiny

__all__ = ["any_qemu", "each_lab", "each_qemu", "lab", "saved", "tiny"]

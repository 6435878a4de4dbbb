# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/bus, for faults too."""

from tests.bus.conftest import any_qemu, lab, tiny

__all__ = ["any_qemu", "lab", "tiny"]

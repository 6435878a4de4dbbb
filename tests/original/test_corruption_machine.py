# SPDX-License-Identifier: GPL-2.0-or-later
"""The corruption catalogue on a QEMU that has cpr-save: machines and disks."""

from __future__ import annotations

from tests.corruption.test_machine import *  # noqa: F403

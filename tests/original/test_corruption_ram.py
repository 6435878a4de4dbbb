# SPDX-License-Identifier: GPL-2.0-or-later
"""The corruption catalogue on a QEMU that has cpr-save: memory."""

from __future__ import annotations

from tests.corruption.test_ram import *  # noqa: F403

# SPDX-License-Identifier: GPL-2.0-or-later
"""The corruption catalogue on a QEMU that has cpr-save: the state, of which it says less than others."""

from __future__ import annotations

from tests.corruption.test_state import *  # noqa: F403

# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent that is killed at every record of the journal, under guests of a QEMU that has cpr-save."""

from __future__ import annotations

from tests.faults.test_kills import *  # noqa: F403

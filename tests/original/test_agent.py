# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance suite of all dialects, and the lives of guests under the agent, on QEMUs that have cpr-save."""

from __future__ import annotations

from tests.bus.test_crashes import *  # noqa: F403
from tests.bus.test_dialects import *  # noqa: F403
from tests.bus.test_faults_loading import *  # noqa: F403
from tests.bus.test_faults_saving import *  # noqa: F403
from tests.bus.test_life import *  # noqa: F403
from tests.bus.test_suspended import *  # noqa: F403

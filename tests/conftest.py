# SPDX-License-Identifier: GPL-2.0-or-later
"""For all tests: none fails because the day is slow."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# SPDX-License-Identifier: GPL-2.0-or-later
"""Upgrades and loads that were, as stories, pictures and pages; metrics and the message of the day."""

# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints and journal on disk: atomic, checksummed, versioned."""

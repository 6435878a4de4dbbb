# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus surface: parse, authorize, call, format."""

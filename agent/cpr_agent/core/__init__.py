# SPDX-License-Identifier: GPL-2.0-or-later
"""The decisions: what may be saved, loaded, resumed, and in which order. Imports no library."""

# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that stay domains of libvirt. The only importer of libvirt."""

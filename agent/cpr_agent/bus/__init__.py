# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus surface: parse, authorize, call, format. The only importer of dbus_next."""

import sys

# dbus_next imports GLib's binding wherever one is installed (dbus_next/glib), and guests wait for that at boot.
sys.modules.setdefault("gi", None)  # type: ignore[arg-type]  # "not there", to import

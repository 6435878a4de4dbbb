# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus surface: parse, authorize, call, format. The only importer of dbus_next."""

import sys
from importlib.util import find_spec, module_from_spec

# dbus_next's __init__ would import its clients for GLib too, and GLib's binding wherever one is installed, for which guests
# would wait at boot.
if (spec := find_spec("dbus_next")) and "dbus_next" not in sys.modules:
    sys.modules["dbus_next"] = module_from_spec(spec)

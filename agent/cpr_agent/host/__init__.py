# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine below: systemd, processes, clock. The only importer of pystemd."""

import sys
from importlib.util import find_spec, module_from_spec

# Only the bindings of pystemd are used. Its __init__ would import its introspected objects too, and lxml for them, for
# which guests would wait at boot.
if (spec := find_spec("pystemd")) and "pystemd" not in sys.modules:
    sys.modules["pystemd"] = module_from_spec(spec)

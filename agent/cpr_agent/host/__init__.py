"""The machine below: systemd, processes, clock. The only importer of pystemd."""

import sys
from importlib.util import find_spec, module_from_spec

# Of pystemd only its bindings are used. Its __init__ takes along objects that are made by introspection, and lxml for that:
# guests wait for it at boot.
if (spec := find_spec("pystemd")) and "pystemd" not in sys.modules:
    sys.modules["pystemd"] = module_from_spec(spec)

"""The D-Bus surface: parse, authorize, call, format. The only importer of dbus_next."""

"""The machine below: systemd, processes, clock. The only importer of pystemd."""

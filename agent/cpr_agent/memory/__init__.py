"""Guest RAM: where it is, whether it is still the same, and the proof of its contents. The only importer of pyudev and
xxhash."""

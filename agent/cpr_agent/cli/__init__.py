"""cprctl: words and tables. Talks to the agent over D-Bus only. The only importer of click and rich."""

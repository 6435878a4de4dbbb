# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's own source, for tests that read it."""

import ast
import gc
from pathlib import Path


def parsed(path: Path) -> ast.Module:
    """The module in a file.

    The garbage of other tests waits meanwhile: the traceback of a task in it whose error nobody took is formatted, which
    parses source too, and CPython 3.11 counts the depth of both as one ("AST constructor recursion depth mismatch")."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()

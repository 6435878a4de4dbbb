# SPDX-License-Identifier: GPL-2.0-or-later
"""For all tests: none fails because the day is slow, or because of where its files lie."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not named after its test: the path of a Unix socket below it has at most 107 bytes (unix(7))."""
    return tmp_path_factory.mktemp("t")

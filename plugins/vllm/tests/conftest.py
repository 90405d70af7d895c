"""Models that the tests make; the engines themselves are under ``engine/``."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

# A busy machine is no defect.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


# Processes that vLLM starts import it anew; without compiled modules each needs half a minute.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

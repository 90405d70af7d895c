"""``python -m engineroom`` is the ``engineroom`` command."""

from __future__ import annotations

import sys

from engineroom.cli import main

if __name__ == "__main__":
    sys.exit(main())

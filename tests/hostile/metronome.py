"""How late a process that does nothing is woken: what the machine's other work costs anybody.

For each line that it reads it prints the longest since the last one, in seconds.
"""

from __future__ import annotations

import select
import sys
import time
from typing import Final

TICK_S: Final = 0.005


def main() -> None:
    longest = 0.0
    while True:
        began = time.perf_counter()
        readable, _, _ = select.select([sys.stdin], [], [], TICK_S)
        if not readable:
            longest = max(longest, time.perf_counter() - began - TICK_S)
        elif sys.stdin.readline():
            print(longest, flush=True)
            longest = 0.0
        else:
            return


if __name__ == "__main__":
    main()

"""Run commands whose standard streams are closed, as a shell closes them; prints what came of each.

    python closed_streams.py < cases.json

Each case is run in a child that is forked from here, so that nothing is imported twice. A case is
``[arguments, numbers of the streams that are closed]``, or ``"full"`` instead of the numbers where
standard output is on a disk that is full; of each are printed the exit status and what was written
to the streams that are open.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from engineroom.cli import app, main  # noqa: F401 - the app, so that it is imported once


def run(arguments: list[str], closed: list[int] | str) -> tuple[int, str]:
    with tempfile.TemporaryFile() as written:
        child = os.fork()
        if child == 0:
            nowhere = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nowhere, 0)
            for number in (1, 2):
                os.dup2(written.fileno(), number)
            if closed == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
                closed = []
            os.closerange(3, 256)
            for number in closed:
                os.close(number)
                setattr(sys, ("stdin", "stdout", "stderr")[number], None)
            status = 70
            try:
                status = main(arguments)
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        written.seek(0)
        return os.waitstatus_to_exitcode(ended), written.read().decode(errors="replace")


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print(json.dumps([run(arguments, closed) for arguments, closed in cases]))

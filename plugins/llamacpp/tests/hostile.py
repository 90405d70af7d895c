"""Run by test_hostile.py in a process of its own, which a bad file may end.

Loads each file that is named on standard input as the runtime does, and uses it; writes what
came of it, a line each, which begins with an arrow: the library may write lines of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engineroom import ConfigurationError, ResourceNotAvailableError
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.loading import estimate_bytes
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

OPTIONS = LlamaCppOptions(n_ctx=64, n_threads=1, n_parallel=1)


def use(path: Path) -> str:
    try:
        read_header(path)
        estimate_bytes(str(path), OPTIONS)
        model = LlamaModel(path, OPTIONS)
    except ConfigurationError as error:
        return "refused" if str(path) in str(error) else f"does not name the file: {error}"
    try:
        tokens = model.tokenize("hello <s> é 🙂\x07")[:40] or [0]
        for token in range(model.n_vocab):
            model.piece(token)
            model.token_bytes(token)
        try:
            context = LlamaContext(model, OPTIONS)
        except ResourceNotAvailableError:
            return "refused"
        try:
            context.begin()
            row = context.add(0, 0, tokens, True)
            if context.decode() == 0:
                context.logits(row).sum()
        finally:
            context.close()
    finally:
        model.close()
    return "used"


if __name__ == "__main__":
    for line in sys.stdin:
        print("=>", use(Path(line.rstrip("\n"))), flush=True)

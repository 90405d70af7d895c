"""One cache for all sequences, or a stream for each (``kv_unified``): which is the faster, where.

``python -m benchmarks.kv_layouts [KIND …]`` prints a table for SmolLM2-135M: for 1, 8 and 32
sequences of 128, 1,024 and 4,000 tokens, with beginnings of their own and with three quarters of
them in common, how many tokens a second of one core are read of the last prompt while the others
are in the cache, and decoded of all. The bare low-level API, two contexts of one model in turn, one
thread, whose processor time counts: what else the machine does changes little. Cells of the others
are copies of the first one's, which cost attention as much; of 32 there are none of 4,000 tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.llamacpp_sides import model_path

SEQUENCES: Final = (1, 8, 32)
LENGTHS: Final = (128, 1024, 4000)
STEPS: Final = 8
_BATCH: Final = 512
_MOST: Final = 40_000


class Layout:
    """A context of one of the layouts."""

    def __init__(self, library: Any, model: Any, sequences: int, room: int, unified: bool) -> None:
        self._library = library
        params = library.llama_context_default_params()
        params.n_ctx = sequences * room
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = unified
        params.no_perf = True
        self._context = library.llama_init_from_model(model, params)
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(_BATCH, 0, 1)

    def measure(self, sequences: int, length: int, common: int) -> tuple[float, float]:
        """Tokens a second: of the last prompt, what is common left out, and decoded of all."""
        library, memory = self._library, self._memory
        library.llama_memory_clear(memory, False)
        last = sequences - 1
        self._read(0, 0, length if last else common)
        if last:
            self._copies(last, length, common)
        if common:
            library.llama_memory_seq_rm(memory, last, common, -1)
        began = time.process_time()
        self._read(last, common, length)
        read = (length - common) / (time.process_time() - began)
        self._decode(sequences, length)
        began = time.process_time()
        for step in range(1, STEPS + 1):
            self._decode(sequences, length + step)
        decoded = STEPS * sequences / (time.process_time() - began)
        return read, decoded

    def _copies(self, last: int, length: int, common: int) -> None:
        """All but the last have what the first one has; of what is common the last one, too."""
        library, memory = self._library, self._memory
        if common:
            for other in range(1, last + 1):
                # Of another stream all is copied, and what is too much removed again.
                library.llama_memory_seq_cp(memory, 0, other, -1, -1)
                library.llama_memory_seq_rm(memory, other, common, -1)
            for other in range(1, last):
                self._read(other, common, length)
            return
        size = library.llama_state_seq_get_size(self._context, 0)
        data = (ctypes.c_uint8 * size)()
        library.llama_state_seq_get_data(self._context, data, size, 0)
        for other in range(1, last):
            library.llama_state_seq_set_data(self._context, data, size, other)

    def _read(self, sequence: int, start: int, end: int) -> None:
        for at in range(start, end, _BATCH):
            places = range(at, min(end, at + _BATCH))
            for row, place in enumerate(places):
                self._put(row, sequence, place, output=place == end - 1)
            self._compute(len(places))

    def _decode(self, sequences: int, place: int) -> None:
        for sequence in range(sequences):
            self._put(sequence, sequence, place, output=True)
        self._compute(sequences)

    def _put(self, row: int, sequence: int, place: int, *, output: bool) -> None:
        batch = self._batch
        batch.token[row] = 1000 + (sequence * 7919 + place * 104729) % 40000
        batch.pos[row] = place
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = output

    def _compute(self, tokens: int) -> None:
        self._batch.n_tokens = tokens
        if status := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self._library.llama_synchronize(self._context)

    def close(self) -> None:
        """Free the context."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)


def row(what: str, read: float, own_read: float, decoded: float, own_decoded: float) -> None:
    """A row of the table."""
    rest = " | ".join(
        f"{unified:,.0f} | {own:,.0f} | {own / unified:.2f}"
        for unified, own in ((read, own_read), (decoded, own_decoded))
    )
    print(f"| {what} | {rest} |", flush=True)


def measure(path: Path, lengths: list[int], counts: list[int]) -> None:
    """Print the rows of one model."""
    import llama_cpp as library

    silence = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silence, ctypes.c_void_p(0))
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    for count in counts:
        for length in lengths:
            if count * length > _MOST:
                continue
            room = (length + 2 * STEPS + 255) // 256 * 256
            layouts = [Layout(library, model, count, room, unified) for unified in (True, False)]
            for common in (0, length * 3 // 4):
                seen = [layout.measure(count, length, common) for layout in layouts]
                (read, decoded), (own_read, own_decoded) = seen
                row(
                    f"{count} | {length:,} | {common or 'none'}",
                    read,
                    own_read,
                    decoded,
                    own_decoded,
                )
            for layout in layouts:
                layout.close()
    library.llama_model_free(model)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_layouts", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["Q4_0"], metavar="KIND")
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--sequences", nargs="*", type=int, default=list(SEQUENCES))
    options = parser.parse_args()
    columns = "sequences | tokens | in common | read: unified | streams | ÷ | decoded: unified"
    print(f"| {columns} | streams | ÷ |\n{9 * '|---'}|")
    for kind in options.kinds:
        measure(model_path(kind), options.lengths, options.sequences)


if __name__ == "__main__":
    main()

"""Long texts, over which llama.cpp's expressions overflow a stack of the usual size."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_hostile import Parts, numbers, string, strings

from engineroom import ConfigurationError, ResourceNotAvailableError
from engineroom_llamacpp import long_runs
from engineroom_llamacpp.long_runs import MOST_CHARACTERS, with_stack_for

SCRIPT = """
import sys
from pathlib import Path
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

model = LlamaModel(Path(sys.argv[1]), LlamaCppOptions(n_threads=1))
for text in ("a", " ", "1", "!", "\\u4f60", "aB", "a b "):
    long = text * (60_000 // len(text))
    print(len(model.tokenize(long)) / len(long.encode()))
"""


def write_bpe(tiny_model: Path, path: Path, pre: bytes) -> Path:
    """The tiny model with byte-pair encoding instead of its own vocabulary."""
    parts = Parts(tiny_model)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    tokens = ["<unk>", "<s>", "</s>", *letters.values(), *(f"word{i}" for i in range(10))]
    kinds = [2, 3, 3, *[1] * (len(tokens) - 3)]
    changes = {
        "tokenizer.ggml.model": string(b"gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": strings(token.encode() for token in tokens),
        "tokenizer.ggml.token_type": numbers("i", kinds),
        "tokenizer.ggml.merges": strings([b"w o", b"r d"]),
    }
    path.write_bytes(parts.image(dict(changes)))
    return path


@pytest.mark.parametrize("pre", ["tekken", "deepseek-llm", "gpt-4o", "exaone-moe", "bloom"])
def test_a_long_run_is_read_and_ends_nothing(tiny_model: Path, tmp_path: Path, pre: str) -> None:
    path = write_bpe(tiny_model, tmp_path / "bpe.gguf", pre.encode())
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 7
    for line in lines:  # every byte is there
        assert float(line) == pytest.approx(1, rel=1e-3)


def test_only_long_texts_get_a_thread_of_their_own() -> None:
    here = threading.get_ident()
    for text in ("", "a" * 999, "word " * 199, "\n" * 999):
        assert with_stack_for(text, threading.get_ident) == here
    for text in ("a" * 1000, "word " * 200, "x " * 99 + "\n" * 1000):
        assert with_stack_for(text, threading.get_ident) != here


def test_other_threads_keep_the_stacks_that_they_had() -> None:
    before = threading.stack_size()
    with_stack_for("a" * 5000, str)
    assert threading.stack_size() == before
    with pytest.raises(ZeroDivisionError):
        with_stack_for("a" * 5000, lambda: 1 // 0)
    assert threading.stack_size() == before


def test_a_run_that_is_too_long_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigurationError, match=f"{MOST_CHARACTERS + 1} .*{MOST_CHARACTERS}"):
        with_stack_for("a " + "b" * (MOST_CHARACTERS + 1), lambda: None)


def test_a_stack_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.stack_size()

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(long_runs.ThreadPoolExecutor, "submit", refuse)
    with pytest.raises(ResourceNotAvailableError, match="can't start new thread"):
        with_stack_for("a" * 5000, lambda: None)
    assert threading.stack_size() == before

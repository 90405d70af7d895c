"""Models of the Hugging Face hub ahead of their use: fetched, checked, shown, removed. Blocks.

``huggingface_hub`` downloads and keeps the files; a connection that breaks is taken up where it
broke, and files that are complete are not fetched again. What it does not do is done here: room on
the disk is looked for before, files' hashes are compared afterwards, and a large file that was not
complete when a process ended is gone on with by the next (:mod:`.compat_huggingface_hub`). The
library's ``verify_repo_checksums`` knows whole repositories only: to check one file that was pulled
it would read all the others that are here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engineroom.errors import (
    ConfigurationError,
    EngineRoomError,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.sources.compat_huggingface_hub import fetch_on, partial_bytes, remove_blob
from engineroom.sources.source import HubSource
from engineroom.units import format_size

__all__ = ["CachedRepo", "HubFile", "cached_repos", "pull", "remove_cached"]

_FULL: Final = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    :param size: bytes; ``None``: the hub does not say.
    :param sha256: of its content, for large files.
    :param git_id: its hash as a blob of git, for small ones.
    """

    name: str
    size: int | None
    sha256: str | None
    git_id: str | None


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository that has files on this machine.

    :param size: bytes on the disk, with those of files that are not complete.
    :param last_used: seconds since 1970.
    """

    repo: str
    size: int
    files: int
    last_used: float
    path: Path


def pull(
    source: HubSource, *, on_progress: Callable[[HubFile, str], None] | None = None
) -> list[tuple[HubFile, Path]]:
    """Fetch what a hub source stands for, and check each file by size and hash.

    Files that are here and right are left alone; one that is damaged is fetched again.

    :param on_progress: is called with each file and what is done with it: ``fetching``,
        ``checking``, ``fetching again`` or ``done``.
    :raises ModelNotFoundError: there is no such repository or file, or the hub is out of reach.
    :raises ResourceNotAvailableError: the disk has no room, or what comes does not match.
    :raises ConfigurationError: ``huggingface_hub`` is not installed.
    """
    hub = _library()
    name = f"hf:{source.repo}" + (f":{source.file}" if source.file else "")
    tell = on_progress or (lambda *_: None)
    with _typed(name):
        info = hub.HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        files = [_file(sibling) for sibling in info.siblings or ()]
        there = {file.name: file for file in files}
        if absent := [name for name in source.files if name not in there]:
            lacks = "no such file" if len(source.files) == 1 else f"no file {', '.join(absent)}"
            more = f" and {len(there) - 40} more" if len(there) > 40 else ""
            known = (", ".join(list(there)[:40]) or "none") + more
            raise ModelNotFoundError(f"{name}: there is {lacks}; the repository has {known}")
        chosen = [there[name] for name in source.files] or files
        _look_for_room(hub, source.repo, info.sha, chosen)
        # By the name of the revision, not by its commit: only then is it found by that name later,
        # without the hub.
        return [(file, _fetch(hub, source.repo, source.revision, file, tell)) for file in chosen]


def cached_repos() -> list[CachedRepo]:
    """The repositories that have files on this machine, by name.

    :raises ConfigurationError: ``huggingface_hub`` is not installed.
    """
    return [
        CachedRepo(name, _size(r), r.nb_files, r.last_accessed, r.repo_path)
        for name, r in sorted(_scan()[1].items())
    ]


def remove_cached(repos: Iterable[str]) -> int:
    """Remove repositories, all revisions of each, from this machine.

    :returns: the bytes that became free.
    :raises ModelNotFoundError: one of them is not here; then none is removed.
    :raises ConfigurationError: ``huggingface_hub`` is not installed.
    """
    cache, here = _scan()
    names = list(dict.fromkeys(repos))
    if missing := [name for name in names if name not in here]:
        raise ModelNotFoundError(
            f"{', '.join(map(repr, missing))}: nothing of it is in the cache (there is: "
            f"{', '.join(sorted(here)) or 'nothing'})"
        )
    freed = sum(_size(here[name]) for name in names)
    revisions = [revision.commit_hash for name in names for revision in here[name].revisions]
    cache.delete_revisions(*revisions).execute()
    return freed


def _size(repo: Any) -> int:
    return int(repo.size_on_disk) + partial_bytes(repo.repo_id)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigurationError(
            'models of the Hugging Face hub need its library; pip install "engineroom[hub]"'
        ) from error
    return huggingface_hub


def _scan() -> tuple[Any, dict[str, Any]]:
    """What the library knows of its cache, and the models in it by name."""
    hub = _library()
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = hub.scan_cache_dir()
    except CacheNotFound:  # nothing was ever downloaded
        return None, {}
    return cache, {repo.repo_id: repo for repo in cache.repos if repo.repo_type == "model"}


def _file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    return HubFile(
        sibling.rfilename,
        sibling.size,
        lfs.sha256 if lfs is not None else None,
        sibling.blob_id if lfs is None else None,
    )


def _look_for_room(hub: Any, repo: str, revision: str, files: Sequence[HubFile]) -> None:
    """Refuse before the first byte where the disk cannot hold what is missing."""
    from huggingface_hub import constants

    missing = sum(
        max(0, (file.size or 0) - (partial_bytes(repo, file.sha256) if file.sha256 else 0))
        for file in files
        if not isinstance(hub.try_to_load_from_cache(repo, file.name, revision=revision), str)
    )
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:  # it is made with the first file
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ResourceNotAvailableError(
            f"hf:{repo} needs {format_size(missing)} more on the disk, and {str(folder)!r} has "
            f"{format_size(free)} free; remove something (`engineroom models rm-cache`), or set "
            "HF_HOME to a larger disk"
        )


def _fetch(
    hub: Any, repo: str, revision: str | None, file: HubFile, tell: Callable[[HubFile, str], None]
) -> Path:
    tell(file, "fetching")
    here = isinstance(hub.try_to_load_from_cache(repo, file.name, revision=revision), str)
    if not here and file.sha256 is not None and file.size is not None:
        fetch_on(hub, repo, revision, file.name, file.sha256, file.size)
    path = Path(hub.hf_hub_download(repo, file.name, revision=revision))
    tell(file, "checking")
    if _wrong(path, file) is None:
        tell(file, "done")
        return path
    tell(file, "fetching again")
    path = Path(hub.hf_hub_download(repo, file.name, revision=revision, force_download=True))
    if (wrong := _wrong(path, file)) is None:
        tell(file, "done")
        return path
    remove_blob(path)
    raise ResourceNotAvailableError(
        f"hf:{repo}:{file.name} was fetched twice and is not what the hub says: {wrong}; it was "
        "removed. Try again later, or look at what is between here and the hub"
    )


def _wrong(path: Path, file: HubFile) -> str | None:
    """What does not match; ``None``: all that is known of the file does."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size} bytes instead of {file.size}"
    if file.sha256 is not None:
        expected, digest = file.sha256, hashlib.sha256()
    elif file.git_id is not None:
        # How git names a blob; nothing here relies on it against an attacker.
        expected, digest = file.git_id, hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {size}\0".encode())
    else:
        return None
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == expected else "its hash is another"


@contextmanager
def _typed(name: str) -> Iterator[None]:
    """Turn what the library raises into errors that say what to do."""
    try:
        yield
    except EngineRoomError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise ResourceNotAvailableError(
                f"{name}: the disk is full ({error.strerror}); what has come is kept. Remove "
                "something (`engineroom models rm-cache`), or set HF_HOME to a larger disk, and "
                "pull again"
            ) from error
        if isinstance(error, OSError | ValueError | RuntimeError):
            message = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ModelNotFoundError(
                f"{name} could not be fetched: {message}; check the name and the connection, "
                "and log in with `hf auth login` if it is private"
            ) from error
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
            raise ModelNotFoundError(
                f"{name}: the hub ({os.environ.get('HF_ENDPOINT', 'huggingface.co')}) cannot "
                f"be reached: {error}; connect and try again"
            ) from error
        raise

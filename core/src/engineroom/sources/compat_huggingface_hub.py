"""What relies on how ``huggingface_hub`` works inside: its request, its cache's folders. Blocks.

Large files of the hub: a later process goes on where one was stopped. The library takes up a
connection that breaks, but what it has of a file is gone with the process: since version 1.18 it
writes to a file of another name each time, because some file systems do not honour its locks. Here
such a file is fetched with the library's own request into a file of the cache that keeps its name,
stays there whatever happens, and becomes the blob when it is whole. Two writers at once would
damage it: whoever calls this compares the hash afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

__all__ = ["BELOW", "fetch_on", "partial_bytes", "remove_blob"]

BELOW: Final = "3"
"""The first version for which nobody has read that what is used here still works so.

The extra ``hub`` has it as its upper bound. To lift it, read the new ``http_get`` and
``repo_folder_name``, look at the cache's ``blobs``, ``snapshots`` and ``.locks``, and run the tests
of ``pull``.
"""


def fetch_on(hub: Any, repo: str, revision: str | None, name: str, sha256: str, size: int) -> None:
    """Bring a file's content into the library's cache, where ``hf_hub_download`` then finds it.

    Nothing is done where the library alone has to: for what no plain request may fetch (more than
    50 GB), and for hubs that call a file's content by something else than its hash.

    :param hub: the library.
    :param size: bytes that the file has.
    :raises OSError: the disk is full, or what came is not ``size`` bytes; beside it, the errors of
        the library and of its HTTP client. What has come is kept.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    if size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    url = hub.hf_hub_url(repo, name, revision=revision)
    metadata = hub.get_hf_file_metadata(url)
    if metadata.etag != sha256 or metadata.commit_hash is None:
        return
    folder = _folder(repo)
    lock = folder.parent / ".locks" / folder.name / f"{sha256}.lock"  # the library's own
    blob = folder / "blobs" / sha256
    # A repository without it counts as damaged, and could be neither listed nor removed.
    (folder / "snapshots" / metadata.commit_hash).mkdir(parents=True, exist_ok=True)
    for path in (lock, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    with hub.utils.WeakFileLock(lock):
        partial = _partial(blob)
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        with partial.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
                file.seek(0)
            while (here := file.tell()) < size:
                try:
                    http_get(
                        url,
                        file,
                        resume_size=here,
                        headers=hub.utils.build_hf_headers(),
                        expected_size=size,
                        displayed_filename=name,
                    )
                except OSError as error:  # older versions take up some broken connections only
                    if error.errno is not None or file.tell() <= here:
                        raise
        partial.replace(blob)


def partial_bytes(repo: str, sha256: str | None = None) -> int:
    """Bytes on this machine of files that are not whole yet: of one, or of all of a repository."""
    blobs = _folder(repo) / "blobs"
    files = blobs.glob("*.incomplete") if sha256 is None else [_partial(blobs / sha256)]
    return sum(file.stat().st_size for file in files if file.is_file())


def remove_blob(path: Path) -> None:
    """Remove a file from the cache: its content, and the name that is a link to it."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _partial(blob: Path) -> Path:
    # Not <hash>.incomplete: older versions of the library leave files of that name with holes.
    return blob.with_name(f"{blob.name}.engineroom.incomplete")


def _folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))

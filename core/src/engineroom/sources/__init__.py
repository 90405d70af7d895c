"""Where models come from: paths, packages, the hub, and the headers of their files.

What ``source:`` may say is read here, found on this machine or fetched, and looked at before any
runtime sees it. Nothing here loads a model: that is a handler's work.
"""

from engineroom.sources.source import (
    HubSource,
    PackageSource,
    PathSource,
    Source,
    find_source,
    parse_source,
    resolve_source,
)

__all__ = [
    "HubSource",
    "PackageSource",
    "PathSource",
    "Source",
    "find_source",
    "parse_source",
    "resolve_source",
]

"""The public names of a package, each loaded when it is first used, as its stub says them.

The stub is asked of whatever the package was imported by: the package may lie in a zip file, or in
a program that was frozen.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable
from typing import Any

import lazy_loader

__all__ = ["attach"]


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    :param package: its name; beside its ``__init__`` there is a stub, ``__init__.pyi``.
    :raises ImportError: there is no stub.
    """
    try:
        stub = pkgutil.get_data(package, "__init__.pyi")
    except OSError:
        stub = None
    if stub is None:
        raise ImportError(
            f"the file __init__.pyi of {package} is missing, which says its names; install "
            "engineroom again, or have what packs the program take the .pyi files along "
            "(PyInstaller: --collect-data engineroom --collect-submodules engineroom)",
            name=package,
        )
    names: dict[str, list[str]] = {}
    for statement in ast.parse(stub).body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            of_module = names.setdefault(statement.module, [])
            of_module += [alias.asname or alias.name for alias in statement.names]
    attached: tuple[Any, Any, Any] = lazy_loader.attach(package, submod_attrs=names)
    return attached

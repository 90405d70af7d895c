"""The contract with runtimes, and how they are found and chosen.

The base classes of a handler, the hooks of observers, and the registry with its parts: discovery
through entry points, checks, observers, dispatch. Loading models with a handler is in
:mod:`engineroom.models`, working on requests in :mod:`engineroom.inference`.
"""

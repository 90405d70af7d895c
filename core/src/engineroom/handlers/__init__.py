"""The contract with runtimes, and how they are found and chosen.

The base classes of a handler, the hooks of observers, discovery through entry points, checks,
order and dispatch. Loading models with a handler is in :mod:`engineroom.models`.
"""

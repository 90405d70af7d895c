"""Memory of the machine and of its devices: measured, and accounted for.

The account says who holds how much and who would have to go; the probe measures; the machine
tells what the process may use. Which models live and die by it is in :mod:`engineroom.models`.
Plugins may use the names that ``__init__.pyi`` says.
"""

from engineroom.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__)

"""Where models come from: paths, packages, the hub, and the headers of their files.

What ``source:`` may say is read here, found on this machine or fetched, and looked at before any
runtime sees it. Nothing here loads a model: that is a handler's work. Public for plugins, with
the names that ``__init__.pyi`` says.
"""

from engineroom.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__)

"""Parts for runtimes that decode in this process: a batch, its queue, its thread, its tokens.

Public for plugins through ``from engineroom.engine import …``; the stub beside this file says
what there is. Runtimes with a scheduler of their own need little of it.

Each name is loaded when it is first used. Those of sampling need numpy, which every runtime
brings along: core does not depend on it, and an extra for it would install nothing that is not
there.
"""

from __future__ import annotations

from engineroom.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__)

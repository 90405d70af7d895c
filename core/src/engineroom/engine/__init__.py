"""Parts for runtimes that decode in this process: a batch, its queue, its thread.

Public for plugins through ``from engineroom import …``. Runtimes with a scheduler of their own
need none of it.
"""

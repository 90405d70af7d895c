"""One LLM inference service in front of any runtime.

.. code-block:: python

    import asyncio
    from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager

    async def main():
        manager = LLMModelManager(config_path="deployment.yaml")
        async with LLMInferenceService(manager) as service:
            request = InferenceRequest(model_id="smollm2", prompt="Hello", stream=True)
            async for chunk in await service.process_inference(request):
                print(chunk, end="", flush=True)

    asyncio.run(main())

Read :mod:`engineroom.service` first, then :mod:`engineroom.handlers.base`. Runtimes are plugins:
``pip install engineroom-llamacpp``, and ``engineroom plugins`` lists them.
"""

from __future__ import annotations

import logging
from typing import Any

from engineroom.lazy_names import attach
from engineroom.printable import printable_record

# Each name of the stub is imported when it is first used: pydantic's schemas cost more than all
# else, and whoever only asks for a version or `--help` should not pay for them.
_load, __dir__, __all__ = attach(__name__)


class _Printable(logging.NullHandler):
    """Writes nothing: a library leaves that to the application. What it writes then is safe: this
    is the first handler of all loggers of the project that sees a record.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        printable_record(record)
        return True


logging.getLogger("engineroom").addHandler(_Printable())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("engineroom")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0.0.0"
    elif name in __all__:
        value = _load(name)
    else:
        raise AttributeError(f"module 'engineroom' has no attribute {name!r}")
    globals()[name] = value
    return value

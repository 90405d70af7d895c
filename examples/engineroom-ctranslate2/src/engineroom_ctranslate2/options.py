"""What ``options:`` of a CTranslate2 model may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["CTranslate2Options"]


def _no_switch(value: Any) -> Any:
    """YAML's ``on`` is no number."""
    if isinstance(value, bool):
        raise ValueError(f"give a number, not {str(value).lower()}")
    return value


_Int: TypeAlias = Annotated[int, BeforeValidator(_no_switch), Field(le=2**31 - 1)]


class CTranslate2Options(BaseModel):
    """Options of one model. Unknown keys and wrong values are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_ctx: Annotated[_Int, Field(ge=2)] | None = None
    """Most tokens that prompt and text may have together. ``None``: ``model_max_length`` of
    ``tokenizer_config.json``, or 2048, because CTranslate2's own files do not say it."""
    n_parallel: Annotated[_Int, Field(ge=1, le=256)] = 2
    """Requests that run at one time, over one copy of the weights; more wait."""
    max_queue: Annotated[_Int, Field(ge=0)] = 64
    """Requests that wait; more are refused at once."""
    n_threads: Annotated[_Int, Field(ge=1, le=1024)] | None = None
    """Threads of each running request; ``None``: the processors, shared among ``n_parallel``."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    device_index: Annotated[_Int, Field(ge=0)] = 0
    compute_type: Literal[
        "default",
        "auto",
        "int8",
        "int8_float32",
        "int8_float16",
        "int8_bfloat16",
        "int16",
        "float16",
        "bfloat16",
        "float32",
    ] = "default"
    """Type to compute in; ``default``: as the model was stored, where the device can do that."""
    end_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """Tokens that end the text; ``None``: the ``eos_token`` of the folder's ``config.json``."""
    chat_template: str | None = None
    """A Jinja template to use instead of the model's own."""

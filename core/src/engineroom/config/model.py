"""A model of a deployment: as it is configured, and as it was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engineroom.config.interpolation import without_secrets
from engineroom.errors import EngineRoomError
from engineroom.field_types import Identifier, OrDefault, no_booleans
from engineroom.schemas import FrozenSchema, PrefixCacheScope
from engineroom.sources.vectors import VectorSizes
from engineroom.units import DeviceSizes, Duration

__all__ = ["LoadedModel", "ModelConfig", "ModelVariant", "source_mistake"]

_E = TypeVar("_E", bound=EngineRoomError)


class ModelVariant(FrozenSchema):
    """One way to run a model: which runtime, from which source, with which options."""

    source: Annotated[str, Field(min_length=1)]
    runtime: Identifier | None = None
    options: Annotated[dict[str, Any], OrDefault] = Field(default_factory=dict)
    memory: DeviceSizes | None = None
    """What it takes of each device; ``None``: as its runtime estimates."""


def source_mistake(model: Mapping[str, Any]) -> str | None:
    """What is wrong about where a model comes from, given its fields; ``None``: nothing."""
    if not model.get("variants"):
        if model.get("source"):
            return None
        return "give a source (a path, hf:owner/name or package:module/file)"
    if any(model.get(key) for key in ("source", "runtime", "options", "memory")):
        return "give either variants, or source with runtime, options and memory; both were given"
    return None


class ModelConfig(FrozenSchema):
    """A model of a deployment: what it is called, where it comes from, what runs it."""

    model_id: Identifier
    source: Annotated[str, Field(min_length=1)] | None = None
    """A path, ``hf:owner/name[:file]``, or ``package:module/file``; see ``docs/usage.md``."""
    runtime: Identifier | None = None
    """Name of the handler that loads it; ``None``: the first whose ``can_load`` says yes."""
    options: Annotated[dict[str, Any], OrDefault] = Field(default_factory=dict)
    """The runtime's own options, checked by the runtime."""
    aliases: Annotated[list[Identifier], OrDefault] = Field(default_factory=list)
    """Other names that requests may use."""
    variants: Annotated[list[ModelVariant], OrDefault] = Field(default_factory=list)
    """Several ways to run it, in order of preference, instead of ``source`` and ``runtime``."""
    memory: DeviceSizes | None = None
    """What it takes of each device, ``{"cpu": "2GiB"}``; ``None``: as its runtime estimates."""
    preload: Annotated[bool, OrDefault] = True
    """Load it in ``load_configured_models()`` rather than with its first request."""
    pinned: Annotated[bool, OrDefault] = False
    """Never unload it to make room for another."""
    priority: Annotated[int, BeforeValidator(no_booleans), Field(ge=-100, le=100), OrDefault] = 0
    """Of the models that could go to make room, those of a lower priority go first."""
    keep_alive: Duration | None = None
    """Seconds that it stays loaded without a request (``5m``, ``forever``, ``0``: it goes at
    once); ``None``: as the deployment."""
    load_timeout_s: Annotated[float, BeforeValidator(no_booleans), Field(ge=0)] | None = None
    """Seconds that its requests wait for room to load it; ``None``: as the deployment."""
    fallback: bool | None = None
    """Try the next variant where one fails to load; ``None``: as the deployment."""
    prefix_cache_scope: PrefixCacheScope | None = None
    """Who finds again what was computed of a prompt: requests of the same ``key``, or all
    (``shared``); ``None``: as the deployment."""

    @model_validator(mode="after")
    def _has_a_source(self) -> ModelConfig:
        if mistake := source_mistake(vars(self)):
            raise ValueError(mistake)
        return self

    def without_secrets(self, error: _E) -> _E:
        """Take out of an error what the environment says in the options.

        :returns: the error itself.
        """
        error.message = without_secrets(error.message, self.options)
        error.args = (error.message, *error.args[1:])
        return error

    def choices(self) -> list[ModelConfig]:
        """This model once per variant, each with a source of its own, in order of preference."""
        own = [self.model_copy(update={**dict(v), "variants": []}) for v in self.variants]
        return own or [self]


class LoadedModel(BaseModel):
    """A model in memory, as the handler that loaded it made it. Compared by identity."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model_id: str
    model_object: Any
    """The runtime's own object; only its handler looks inside."""
    config: ModelConfig
    handler_name: str | None = None
    """Name of the handler that loaded it."""
    tokenizer: Any = None
    max_context_tokens: int | None = None
    """Most tokens that prompt and generated text may have together."""
    memory_bytes: int | None = None
    vector_sizes: VectorSizes | None = None
    """How long its vectors are, and to what lengths they may be cut; ``None``: it is not told."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

"""What a request's next token may be: grammars compiled by llguidance, and where each request is.

A :class:`GrammarCompiler` belongs to a model: it has the vocabulary in llguidance's form, made
when the first request needs it, and keeps what it has compiled. A :class:`Constraint` belongs to a
request. It is asked about one token, or for all that are possible, and told what was chosen.

Most tokens that a model likes best are possible. So a sampler draws first, asks about that token
alone (some microseconds), and masks the others only where it is refused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import lru_cache, partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from engineroom.engine.constraint import Constraint
from engineroom.engine.later_end import LaterEnd
from engineroom.engine.reasoning_budget import BudgetedConstraint, ReasoningBudget
from engineroom.errors import ConfigurationError
from engineroom.generation.answer_grammars import lacking, refusal
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.prompts.model_tokens import ModelTokens
from engineroom.prompts.reading import in_lane
from engineroom.prompts.work import Reading
from engineroom.schemas import InferenceRequest

__all__ = ["GrammarCompiler", "compiled", "grammar_of", "reasoning_budget_of"]

MAX_COMPILED_CHARS: Final = 4_000_000
"""Characters of the grammars that a model's compiled ones are kept for; the oldest go first."""
_COMPILE_FUEL: Final = 4_000_000
"""Of llguidance's, some 50,000 a millisecond: bounds the compiling of one grammar."""
_CHARS_OF_TOOL: Final = 1000
"""What a tool counts where prompts are read."""
_LARGEST_GRAMMAR: Final = 200_000
"""Symbols of a compiled grammar."""
_LONGEST_ROW: Final = 8_000
"""What the parser keeps for one place of the text: some 2,000 properties that may be left out. A
token takes 35 ms then, for which llguidance keeps the interpreter."""


class GrammarCompiler:
    """Compiles a model's grammars, where its prompts are read, and keeps them.

    :param codec: the model's :class:`~engineroom.prompts.PromptCodec`.
    """

    def __init__(self, codec: Any) -> None:
        self._codec = codec
        self._vocabulary: tuple[Any, int, frozenset[int]] | None = None
        self._ends: tuple[int, frozenset[int]] | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._kept = 0  # characters
        self._lock = threading.Lock()

    async def compile(
        self, request: InferenceRequest, tail: str | None = None
    ) -> Constraint | None:
        """What the answer to a request must match, at its beginning; ``None``: nothing.

        What is compiling goes on where nobody waits any more: it is bounded, and the next request
        finds it.

        :param tail: how the prompt ends that a chat template wrote.
        :raises ConfigurationError: it is not valid, or too large; or llguidance is not installed.
        :raises QueueFullError: too many prompts and grammars wait to be read.
        :raises ResourceNotAvailableError: the model is being unloaded.
        """
        work = partial(self._begin, request, tail)
        return await in_lane(self._codec, work, key=request.key_name, size=_size(request))

    def _begin(self, request: InferenceRequest, tail: str | None) -> Constraint | None:
        budget = reasoning_budget_of(self._codec, request, tail)
        if request.constrained or budget is not None:
            _check_library(request)
        constraint = self._match(request, tail) if request.constrained else None
        if budget is not None:
            table, width, _ = self._table()
            constraint = BudgetedConstraint(constraint, budget, partial(_piece, table), width)
        if least := request.params.least_tokens:
            width, ends = self._width_and_ends()
            if ends:
                return LaterEnd(constraint, least, width, ends)
        return constraint

    def _match(self, request: InferenceRequest, tail: str | None) -> Constraint:
        grammar = _traits_of(self._codec).grammar(request, tail)
        with self._lock:
            if (matcher := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = self._compile(grammar, request)
        _, width, ends = self._table()
        with self._lock:  # no two threads may be at one matcher
            return Constraint(matcher.deep_copy(), width, ends)

    def _compile(self, grammar: str, request: InferenceRequest) -> Any:
        tokenizer, _, _ = self._table()
        matcher = _matcher(tokenizer, grammar, request)
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = matcher
                self._kept += len(grammar)
                while self._kept > MAX_COMPILED_CHARS and len(self._compiled) > 1:
                    oldest, _ = self._compiled.popitem(last=False)
                    self._kept -= len(oldest)
        return matcher

    def _width_and_ends(self) -> tuple[int, frozenset[int]]:
        """How many logits there are, and what ends a text; needs no llguidance."""
        if self._ends is None:
            self._ends = self._codec.width_and_ends()
        return self._ends

    def _table(self) -> tuple[Any, int, frozenset[int]]:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._codec.model_tokens())
            return self._vocabulary


def _check_library(request: InferenceRequest) -> None:
    """:raises ConfigurationError: llguidance is not installed; names what needs it."""
    try:
        import llguidance  # noqa: F401 - whether it is there
    except ImportError as error:
        raise lacking(request, error) from error


def _vocabulary(tokens: ModelTokens) -> tuple[Any, int, frozenset[int]]:
    """The vocabulary in llguidance's form, how many logits it has, and what ends a text."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if not tokens.ends:
        raise ConfigurationError("the model has no token that ends a text; a grammar needs one")
    width = len(tokens.pieces)
    table = LLTokenizer(
        TokenizerWrapper(_Tokens(tokens)), n_vocab=width, eos_token=list(tokens.ends)
    )
    return table, width, frozenset(tokens.ends)


def _piece(table: Any, token: int) -> bytes:
    piece: bytes = table.decode_bytes([token])
    return piece


def _matcher(tokenizer: Any, grammar: str, request: InferenceRequest) -> Any:
    """A grammar, compiled.

    :param request: what the grammar is made of.
    :raises ConfigurationError: it is not valid, or too large.
    """
    matcher = compiled(tokenizer, grammar)
    if matcher.is_error():
        raise refusal(request, grammar, matcher.get_error())
    return matcher


def compiled(tokenizer: Any, grammar: str) -> Any:
    """A grammar, compiled within bounds, and tried out with its first token.

    The first mask is the dearest, and is kept with the grammar.

    :param tokenizer: llguidance's ``LLTokenizer``.
    :param grammar: in Lark.
    :returns: llguidance's ``LLMatcher``; ``is_error()`` where it is not valid, or too large.
    """
    from llguidance import LLMatcher, LLParserLimits

    bounds = LLParserLimits(
        initial_lexer_fuel=_COMPILE_FUEL,
        max_grammar_size=_LARGEST_GRAMMAR,
        max_items_in_row=_LONGEST_ROW,
        verbose_errors=False,  # which would tell what clients wrote
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=bounds)
    if not matcher.is_error():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        opening = tokenizer.tokenize_str("{")[-1:]  # a schema's longest row is behind it
        for token in (int(bits.argmax()), *opening):
            beyond = matcher.deep_copy()
            if bits[token] and beyond.try_consume_tokens([token]):
                beyond.compute_bitmask()
            if beyond.is_error():
                return beyond
    return matcher


class _Tokens:
    """A vocabulary as llguidance asks for it.

    It panics where an answer is an error. So what it has read is read to its end, though nobody
    may wait for the grammar any more.
    """

    def __init__(self, tokens: ModelTokens) -> None:
        self.eos_token_id = tokens.ends[0]
        self.bos_token_id = None
        self.tokens = list(tokens.pieces)
        self.special_token_ids = sorted(tokens.special)
        self._encode = tokens.encode

    def __call__(self, text: str | bytes) -> list[int]:
        with Reading(stopped=_never):
            return self._encode(text if isinstance(text, str) else text.decode())


def _never() -> bool:
    return False


def _size(request: InferenceRequest) -> int:
    """How much there is to read, about."""
    output = request.params.structured_output
    tools = _CHARS_OF_TOOL * len(request.tools or ())
    return tools if output is None else tools + len(output.regex or output.grammar or "")


_special: WeakKeyDictionary[Any, frozenset[bytes]] = WeakKeyDictionary()
"""Codec → its special tokens' texts."""


@lru_cache(maxsize=8)
def _bytes_and(special: frozenset[bytes]) -> Any:
    """A vocabulary of bytes, and of special tokens, which grammars may name."""
    pieces = [*(bytes([byte]) for byte in range(256)), b"", *sorted(special)]
    named = frozenset(range(257, len(pieces)))
    return _vocabulary(ModelTokens(pieces, named, [256], lambda text: list(text.encode())))[0]


def _special_of(codec: Any) -> frozenset[bytes]:
    """The texts of a model's special tokens, as far as the codec can tell."""
    if (known := _special.get(codec)) is None:
        try:
            tokens: ModelTokens = codec.model_tokens()
        except ConfigurationError:
            known = frozenset()
        else:
            known = frozenset(filter(None, (tokens.pieces[n] for n in tokens.special)))
        _special[codec] = known
    return known


def _traits_of(codec: Any) -> ModelTraits:
    traits: ModelTraits = getattr(codec, "traits", PLAIN)
    return traits


def reasoning_budget_of(
    codec: Any, request: InferenceRequest, tail: str | None
) -> ReasoningBudget | None:
    """The bound of the reasoning of an answer; ``None``: it has none, or there is no reasoning.

    :param codec: the model's.
    :param tail: how the prompt ends that a chat template wrote.
    """
    if (budget := request.reasoning_budget) is None:
        return None
    if (thoughts := _traits_of(codec).thoughts(request, tail)) is None:
        return None
    return ReasoningBudget(thoughts, budget, codec.read(f"{thoughts.end}\n\n"))


async def grammar_of(
    codec: Any, request: InferenceRequest, tail: str | None = None, *, closed: bool = False
) -> str | None:
    """The grammar of what a request asks for, in Lark, for a runtime that compiles it itself.

    It is tried out with a vocabulary of bytes and the model's special tokens.

    :param codec: the model's; it is made where its prompts are read.
    :param tail: how the prompt ends that a chat template wrote.
    :param closed: the answer goes on behind reasoning that was ended.
    :returns: ``None``: the request asks for no form.
    :raises ConfigurationError: it cannot be a grammar, or is too large.
    """
    if not request.constrained:
        return None

    def read() -> str:
        _check_library(request)
        grammar = _traits_of(codec).grammar(request, tail, closed=closed)
        _matcher(_bytes_and(_special_of(codec)), grammar, request)
        return grammar

    return await in_lane(codec, read, key=request.key_name, size=_size(request))

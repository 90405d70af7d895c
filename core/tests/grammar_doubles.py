"""A vocabulary of bytes, and texts that are drawn out of what a grammar allows."""

import asyncio
import random

from engineroom.engine import GrammarCompiler
from engineroom.generation.outputs import OutputParser, read_output
from engineroom.prompts import ModelTokens

END = 256
PIECES = [bytes([b]) for b in range(256)] + [b"<end>"]
TEXTS = b'abc \n"<>{}\\/[]:,'


class Codec:
    """Knows a vocabulary of bytes, and what its model writes."""

    def __init__(self, traits):
        self.traits = traits
        self.tokens = ModelTokens(PIECES, frozenset({END}), [END], lambda t: list(t.encode()))

    def model_tokens(self):
        return self.tokens


def constraint(traits, request, tail=None):
    return asyncio.run(GrammarCompiler(Codec(traits)).compile(request, tail))


def matches(place, text, *, whole=True):
    for byte in text.encode():
        if not place.allows(byte):
            return False
        place.take(byte)
    return place.complete or not whole


def draw(place, seed, end="", most=3000):
    """A text that is drawn out of what is allowed.

    :param end: what ends free text, which would take for ever to be drawn.
    """
    source, text = random.Random(seed), bytearray()
    while len(text) < most:
        if end and source.random() < 0.1 and matches(ended := place.copy(), end, whole=False):
            place = ended
            text += end.encode()
        mask = place.allowed()
        if place.complete and (place.ended or source.random() < 0.2):
            return text.decode(errors="replace")
        allowed = [token for token in range(END) if mask[token]]
        if not allowed:
            return text.decode(errors="replace")
        likely = [token for token in allowed if token in TEXTS] or allowed
        ending = [token for token in allowed if token in b'"<\n}]/'] if len(text) > 200 else []
        token = source.choice(ending or likely)
        place.take(token)
        text.append(token)
    return None


def text_end(form):
    """What a text that stands as it is ends with."""
    dialect = getattr(form, "dialect", None)
    if dialect is not None and dialect.mark is not None:
        return dialect.mark.texts[0]
    end = getattr(form, "value_end", "")
    return f"\n{end}" if getattr(form, "lines", False) else end


def drawn_calls(traits, request, seed, size):
    """Calls as they are read out of a text that is drawn out of what a request's grammar allows,
    fed in pieces of some characters; ``None``: it has no end.
    """
    place, form = constraint(traits, request), traits.written_as(request)
    if (text := draw(place, seed, text_end(traits.tools.form))) is None:
        return None
    parser = OutputParser(form, request.tools, only_calls=True)
    events = [e for i in range(0, len(text), size) for e in parser.feed(text[i : i + size])]
    output = read_output(events + parser.finish())
    assert output.calls and not output.content.strip(), text
    return output.calls

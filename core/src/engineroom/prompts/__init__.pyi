# What plugins may import from here; ``__init__.py`` reads this file.

from .chat_options import (
    ChatOptions as ChatOptions,
)
from .chat_template import (
    ChatTemplate as ChatTemplate,
    ModelTemplates as ModelTemplates,
)
from .codec import (
    PromptCodec as PromptCodec,
)
from .least_tokens import (
    LeastTokens as LeastTokens,
)
from .limits import (
    check_adapter as check_adapter,
    check_beams as check_beams,
    check_prompt as check_prompt,
    check_prompt_logprobs as check_prompt_logprobs,
    check_texts as check_texts,
    check_token_ids as check_token_ids,
)
from .messages import (
    for_template as for_template,
)
from .model_tokens import (
    ModelTokens as ModelTokens,
)
from .pairs import (
    PairFrame as PairFrame,
    PairTokens as PairTokens,
    pair_frame as pair_frame,
)
from .reading import (
    read_prompt as read_prompt,
    stop_reading as stop_reading,
    tokens_of as tokens_of,
    tokens_of_pairs as tokens_of_pairs,
    tokens_of_texts as tokens_of_texts,
)
from .special_tokens import (
    ControlTokens as ControlTokens,
)
from .threads import (
    PromptLane as PromptLane,
)
from .token_bytes import (
    byte_alphabet as byte_alphabet,
    bytes_of_token as bytes_of_token,
    decoder_kinds as decoder_kinds,
)
from .tokenizer_codec import (
    TokenizerCodec as TokenizerCodec,
)
from .tokenizer_reader import (
    TokenizerReader as TokenizerReader,
    encoding_of as encoding_of,
    surroundings as surroundings,
)
from .work import (
    check_stopped as check_stopped,
    expect_tokens as expect_tokens,
)

__all__: list[str]

# What plugins may import from here; ``__init__.py`` reads this file.

from .chat_template import (
    ChatTemplate as ChatTemplate,
)
from .chat_template import (
    ModelTemplates as ModelTemplates,
)
from .codec import (
    PromptCodec as PromptCodec,
)
from .codec import (
    tokens_of as tokens_of,
)
from .limits import (
    check_adapter as check_adapter,
)
from .limits import (
    check_prompt as check_prompt,
)
from .limits import (
    check_texts as check_texts,
)
from .limits import (
    check_token_ids as check_token_ids,
)
from .messages import (
    for_template as for_template,
)
from .special_tokens import (
    ControlTokens as ControlTokens,
)
from .token_bytes import (
    byte_alphabet as byte_alphabet,
)
from .token_bytes import (
    decoder_kinds as decoder_kinds,
)
from .token_bytes import (
    token_bytes as token_bytes,
)
from .tokenizer_codec import (
    TokenizerCodec as TokenizerCodec,
)
from .tokenizer_codec import (
    encoding_of as encoding_of,
)
from .tokenizer_codec import (
    surroundings as surroundings,
)

__all__: list[str]

"""Rules of what one request is answered with."""

from __future__ import annotations

from typing import Final

from engineroom.testing.conformance.rules.rule import Rule

__all__ = ["CHAT", "PARAMETERS", "TEXT", "TOKEN_IDS"]

TEXT: Final = {
    "answers": Rule(
        "infer answers",
        "infer returns an InferenceResponse with the request's ids, the text, the finish reason "
        "and, where they are known, the counts.",
    ),
    "chunks-are-text": Rule(
        "Chunks are str",
        "stream_infer yields str, and nothing else, that UTF-8 can write.",
    ),
    "stream-ends": Rule(
        "A stream ends",
        "After its last chunk the generator of stream_infer ends by itself, at once.",
    ),
    "nothing-after-the-end": Rule(
        "StreamEnd is the last item",
        "Where stream_infer yields a StreamEnd it does so once, and yields nothing after it.",
    ),
    "stream-equals-infer": Rule(
        "A stream and a whole answer are the same",
        "For the same greedy request the joined chunks are the text of infer, and the finish "
        "reason, the stop sequence and the counts are the same.",
    ),
    "stream-is-incremental": Rule(
        "A stream comes piece by piece",
        "Text is given out as it is generated, also where stop sequences are looked for: only what "
        "may still become one is held back.",
    ),
    "whole-characters": Rule(
        "Characters come whole",
        "A character that is split over tokens is held until it is whole; no half of one is "
        "streamed.",
    ),
    "stop-sequence": Rule(
        "A stop sequence is reported",
        "Where a stop sequence ends the text, finish_reason is stop_sequence and the response "
        "names it.",
    ),
    "stop-cut-over-tokens": Rule(
        "A stop sequence may be cut",
        "A stop sequence that comes in pieces, over several tokens, is found, and no piece of it "
        "is given out.",
    ),
    "stop-earliest": Rule(
        "The earliest stop sequence wins",
        "Of several stop sequences the one that starts first in the text ends it, whatever their "
        "order in the list.",
    ),
    "stop-prefix-of-another": Rule(
        "One stop sequence may begin another",
        "A stop sequence that is the beginning of a longer one ends the text also where the longer "
        "one does not follow.",
    ),
    "stop-incomplete": Rule(
        "What was held back is given out",
        "Text that only looked like the beginning of a stop sequence is part of the answer.",
    ),
    "stop-in-the-prompt": Rule(
        "The prompt does not stop",
        "A stop sequence is looked for in the generated text; one in the prompt does not count.",
    ),
    "stop-at-the-first-token": Rule(
        "The first token may stop",
        "A stop sequence at the very beginning of the text leaves an empty text.",
    ),
}

PARAMETERS: Final = {
    "token-counts": Rule(
        "Tokens are counted right",
        "prompt_tokens and count_tokens agree, but for what the model adds to every prompt; "
        "tokenize tells as many tokens, and token_bytes their text.",
    ),
    "max-new-tokens": Rule(
        "max_new_tokens is exact",
        "No more tokens are generated than max_new_tokens says, and reaching it is the finish "
        "reason length.",
    ),
    "max-new-tokens-none": Rule(
        "Without max_new_tokens the context is the limit",
        "max_new_tokens=None goes on until the model ends the text or the context is full, not to "
        "a default of the runtime.",
    ),
    "min-tokens": Rule(
        "min_tokens is honoured",
        "Before so many tokens the text does not end: no end-of-sequence token comes, and no stop "
        "sequence ends it.",
    ),
    "ignore-eos": Rule(
        "ignore_eos is honoured",
        "The text goes on to max_new_tokens: no end-of-sequence token ever comes.",
    ),
    "none-is-neutral": Rule(
        "None is the neutral value",
        "None means the same as a field's neutral value (temperature 1, no truncation, no "
        "penalty), never a default of the runtime or of the model's files.",
    ),
    "unclaimed-parameters": Rule(
        "What is not claimed is refused or ignored",
        "A field that capabilities() does not claim is refused by name, or, with "
        'on_unsupported="warn", ignored: the answer is as without it.',
    ),
    "unknown-adapter": Rule(
        "An adapter that is not there is refused by name",
        "A request that names an adapter which was not loaded with the model is a "
        "ConfigurationError that names it, and the next request is answered; a handler that does "
        "not claim adapters leaves this to the service.",
    ),
    "temperature-zero": Rule(
        "temperature=0 is greedy",
        "temperature=0 takes the likeliest token always, whatever do_sample and seed say.",
    ),
    "temperature": Rule(
        "temperature has its effect",
        "A temperature near 0 comes to the greedy text, and a high one varies it.",
    ),
    "do-sample": Rule(
        "do_sample=False is greedy",
        "do_sample=False takes the likeliest token always, whatever the temperature.",
    ),
    "seed": Rule(
        "A seed makes a text again",
        "The same request with the same seed has the same text, and other seeds have others.",
    ),
    "seed-beside-neighbours": Rule(
        "A seed is the request's own",
        "A seeded request has the same text beside other, unseeded requests as alone.",
    ),
    "top-k": Rule(
        "top_k is honoured",
        "top_k=1 is greedy, whatever the temperature.",
    ),
    "top-p": Rule(
        "top_p is honoured",
        "A top_p near 0 keeps only the likeliest token, whatever the temperature.",
    ),
    "min-p": Rule(
        "min_p is honoured",
        "min_p=1 keeps only the likeliest token, whatever the temperature.",
    ),
    "repetition-penalty": Rule(
        "repetition_penalty is honoured",
        "A high repetition_penalty changes a text that repeats tokens of the prompt or its own.",
    ),
    "presence-penalty": Rule(
        "presence_penalty is honoured",
        "presence_penalty changes the text, but never its first token: only generated tokens "
        "count.",
    ),
    "frequency-penalty": Rule(
        "frequency_penalty is honoured",
        "frequency_penalty changes the text, but never its first token: only generated tokens "
        "count.",
    ),
    "logit-bias": Rule(
        "logit_bias is honoured",
        "A bias of -100 keeps a token out of the text, and one of 100 brings it in.",
    ),
    "logprobs": Rule(
        "logprobs are complete",
        "There is an entry for each generated token, with as many alternatives as were asked for, "
        "likeliest first, as the model gave them before bias, penalties and temperature.",
    ),
    "prompt-logprobs": Rule(
        "Log probabilities of the prompt are complete",
        "There is an entry for each of prompt_tokens, whether its work was done before or not, the "
        "first without a log probability, and the others with those that the same tokens have when "
        "they are generated.",
    ),
    "num-beams": Rule(
        "num_beams is honoured",
        "Beam search gives the same text each time, and finds others than the greedy one.",
    ),
    "early-stopping": Rule(
        "early_stopping is honoured",
        "early_stopping is claimed only together with num_beams, and makes a text no longer.",
    ),
    "structured-output": Rule(
        "structured_output is honoured",
        "The text matches what was given, a JSON schema, any JSON object, a regular expression, "
        "one of several texts or a grammar, for each kind that capabilities() claims.",
    ),
    "structured-seeds": Rule(
        "A schema holds whatever is drawn",
        "At temperature 1.5 fifty seeds give fifty texts that are valid by a schema, whatever else "
        "is asked for, the same seed the same text, and a request beside them has the text that it "
        "has alone.",
    ),
    "tool-calls": Rule(
        "Calls that have to be are valid",
        'With tool_choice="required" each seed gives a call of a tool that was offered, valid by '
        "its schema, alone with parallel_tool_calls=False, the same streamed and whole; and the "
        "model reads its tools, its calls and what they returned.",
    ),
    "hostile-grammar-neighbour": Rule(
        "A hostile grammar harms nobody",
        "A regular expression, schema or grammar that is none is a ConfigurationError, one that "
        "grows is answered or refused, and beside and after them others have their own answers.",
    ),
}

CHAT: Final = {
    "chat-template": Rule(
        "Messages are rendered with the model's template",
        "Messages, and the same text rendered by hand and sent as prompt, have the same answer.",
    ),
    "chat-roles": Rule(
        "Roles in an unusual order are answered or refused",
        "Messages whose roles the model does not know, or not in that order, are answered or are a "
        "ConfigurationError that says what is wrong with them.",
    ),
    "continued-message": Rule(
        "A last message of the assistant's is continued",
        "With continue_final_message the prompt ends where the message does, and the answer is "
        "what comes next, without the message; with False a new message begins.",
    ),
    "reasoning-apart": Rule(
        "Reasoning is told apart from content",
        "What a model thinks is response.reasoning and ReasoningDelta in streams; no content has "
        "it, neither has its markers, and stop sequences and structured output are about content "
        "alone.",
    ),
}

TOKEN_IDS: Final = {
    "prompt-token-ids": Rule(
        "Token ids are a prompt as they are",
        "prompt_token_ids have the answer that the text has whose tokens they are, and nothing is "
        "added to them.",
    ),
    "prompt-token-ids-refused": Rule(
        "Token ids that cannot be read are refused",
        "Ids that the model has not, and more of them than the context has room for, are a "
        "ConfigurationError, and the next request is answered.",
    ),
}

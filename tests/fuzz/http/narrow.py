"""The served schema, narrower, so that requests get as far as the engine.

By the schema itself a prompt may be absent, any text is a model and any number a temperature: of requests drawn from it
hardly one is answered with tokens.
"""

from __future__ import annotations

import copy
from typing import Any

Schema = dict[str, Any]

VOCABULARY = 4096
"""Of the demo model."""
TEXT = {"type": "string", "minLength": 1, "maxLength": 64}
TOKEN = {"type": "integer", "minimum": 0, "maximum": VOCABULARY - 1}
FLAG = {"type": "boolean"}


def number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def several(items: Schema, least: int = 1, most: int = 4) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def record(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": required | optional,
        "required": [*required],
        "additionalProperties": False,
    }


SAMPLING: dict[str, Schema] = {
    "max_tokens": integer(1, 8),
    "min_tokens": integer(0, 1),
    "n": integer(1, 2),
    "temperature": number(0, 2),
    "top_p": number(0.1, 1),
    "top_k": integer(-1, 50),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.5, 2),
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "stop": {"anyOf": [TEXT, several(TEXT)]},
    "stop_token_ids": several(TOKEN),
    "bad_words": several(TEXT),
    "allowed_token_ids": several(TOKEN),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"enum": ["0", "7", str(VOCABULARY - 1)]},
        "additionalProperties": number(-100, 100),
    },
    "stream": FLAG,
    "ignore_eos": FLAG,
    "include_stop_str_in_output": FLAG,
    "skip_special_tokens": FLAG,
    "use_beam_search": FLAG,
    "return_token_ids": FLAG,
    "return_tokens_as_token_ids": FLAG,
    "truncate_prompt_tokens": integer(1, 8),
    "cache_salt": TEXT,
    "user": TEXT,
    "response_format": record({"type": {"const": "text"}}, {}),
    "structured_outputs": {"type": "null"},
}
"""Within what plain vLLM takes, few tokens."""
STRUCTURED = {
    "structured_outputs": {
        "anyOf": [record({"choice": several(TEXT)}, {}), record({"json_object": {"const": True}}, {})]
    }
}
"""Apart: beside `allowed_token_ids` or `bad_words` a grammar may leave no token, an error of the engine."""
COMMON = {name: SAMPLING[name] for name in ("max_tokens", "n", "temperature", "seed", "stream")}
MESSAGE = record({"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT}, {})
FUNCTION = record({"name": {"enum": ["look", "go"]}}, {"description": TEXT, "parameters": record({}, {})})
TOOL = record({"type": {"enum": ["function"]}, "function": FUNCTION}, {})
COMPLETION = record(
    {"prompt": {"anyOf": [TEXT, several(TEXT, most=2), several(TOKEN), several(several(TOKEN), most=2)]}},
    SAMPLING | {"logprobs": integer(0, 5), "prompt_logprobs": integer(0, 3), "echo": FLAG},
)
CHAT = record(
    {"messages": several(MESSAGE, most=3)},
    SAMPLING
    | {
        "logprobs": {"const": True},
        "top_logprobs": integer(0, 5),
        "tools": several(TOOL, most=2),
        "add_generation_prompt": FLAG,
    },
)
NARROW = {"CompletionRequest": COMPLETION, "ChatCompletionRequest": CHAT}


def narrowed(schema: Schema, model: str) -> Schema:
    """The same paths; every request names the model or none, and completions have a prompt, within what vLLM takes, and
    nothing else, or a grammar, or whatever the schema has."""
    made = copy.deepcopy(schema)
    schemas = made["components"]["schemas"]
    for one in schemas.values():
        if "model" in one.get("properties", {}):
            one["properties"]["model"] = {"enum": [model]}
    for name, narrow in NARROW.items():
        if name in schemas:
            wide = schemas[name]
            wide["required"] = sorted({*wide.get("required", []), *narrow["required"]})
            wide["properties"] |= narrow["properties"]
            needed = {field: narrow["properties"][field] for field in narrow["required"]}
            schemas[name] = {"anyOf": [narrow, record(needed | STRUCTURED, COMMON), wide]}
    return made

"""Golden shapes: which keys the answers of the HTTP surface have, and what kind of value lies under each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Number = (int, float)
NULL = type(None)
MaybeText = (str, NULL)

TOKEN = {"id": int, "text": str, "logprob": (int, float, NULL), "special": bool}
FINISH = ("length", "eos_token", "stop_sequence")
CHAT_FINISH = ("length", "stop", "stop_sequence")

GENERATE: Mapping[str, Any] = {
    "generated_text": str,
    "details": {
        "finish_reason": set(FINISH),
        "generated_tokens": int,
        "seed": (int, NULL),
        "prefill": [{"id": int, "text": str, "logprob": (int, float, NULL)}],
        "tokens": [TOKEN],
    },
}
STREAMED: dict[str, Any] = {"index": int, "token": TOKEN, "generated_text": NULL, "details": NULL}
LAST_STREAMED: Mapping[str, Any] = STREAMED | {
    "generated_text": str,
    "details": {"finish_reason": set(FINISH), "generated_tokens": int, "seed": (int, NULL), "input_length": int},
}
USAGE: dict[str, Any] = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
_HEAD: dict[str, Any] = {"id": str, "created": int, "model": str, "system_fingerprint": str}
CHAT: Mapping[str, Any] = _HEAD | {
    "object": {"chat.completion"},
    "choices": [
        {
            "index": int,
            "message": {"role": {"assistant"}, "content": str},
            "logprobs": NULL,
            "finish_reason": set(CHAT_FINISH),
        }
    ],
    "usage": USAGE,
}
CHAT_CHUNK: Mapping[str, Any] = _HEAD | {
    "object": {"chat.completion.chunk"},
    "choices": [
        {
            "index": int,
            "delta": {},
            "logprobs": NULL,
            "finish_reason": {None, *CHAT_FINISH},
        }
    ],
    "usage": NULL,
}
CHAT_LOGPROBS = {
    "content": [{"token": str, "logprob": Number, "top_logprobs": [{"token": str, "logprob": Number}]}],
}
COMPLETION: Mapping[str, Any] = _HEAD | {
    "object": {"text_completion"},
    "choices": [{"index": int, "text": str, "logprobs": NULL, "finish_reason": set(CHAT_FINISH)}],
    "usage": USAGE,
}
INFO: Mapping[str, Any] = {"model_id": str, "max_input_tokens": int, "max_total_tokens": int, "version": str}
ERROR: Mapping[str, Any] = {"error": str, "error_type": str}


def misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """What does not fit, or None. A shape is a type, several, a set of values, ``[shape of each]`` or a mapping.

    Keys of a mapping must be there; others may be there too, because the surface grows.
    """
    match shape:
        case set():
            return None if value in shape else f"{at or 'it'} is {value!r}; allowed are {sorted(map(str, shape))}"
        case [each]:
            if not isinstance(value, list):
                return f"{at or 'it'} is {value!r} instead of a list"
            found = (misfit(item, each, f"{at}[{n}]") for n, item in enumerate(value))
            return next((problem for problem in found if problem), None)
        case Mapping():
            if not isinstance(value, dict):
                return f"{at or 'it'} is {value!r} instead of an object"
            missing = sorted(shape.keys() - value.keys())
            if missing:
                return f"{at or 'it'} lacks {missing}: {value}"
            found = (misfit(value[key], each, f"{at}.{key}".lstrip(".")) for key, each in shape.items())
            return next((problem for problem in found if problem), None)
    kinds = shape if isinstance(shape, tuple) else (shape,)
    right = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    return None if right else f"{at or 'it'} is {value!r} instead of {' or '.join(kind.__name__ for kind in kinds)}"

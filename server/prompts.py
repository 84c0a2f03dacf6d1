"""Which texts are prompts at all, before any model is asked."""

from __future__ import annotations

import unicodedata

from server.errors import InvalidRequestError
from server.schemas import MAX_PROMPT_CHARS

_ALLOWED_CONTROLS = frozenset("\t\n\r")
_INVISIBLE = frozenset({"Cf", "Zs", "Zl", "Zp", "Cc"})


def check_prompt(prompt: str) -> None:
    """Raises: InvalidRequestError when empty, too long or not text. The prompt is never changed."""
    if len(prompt) > MAX_PROMPT_CHARS:
        message = f"prompt must be at most {MAX_PROMPT_CHARS} characters."
        raise InvalidRequestError("prompt_too_long", message, param="prompt")
    categories = {c: unicodedata.category(c) for c in set(prompt)}
    if any(kind == "Cs" for kind in categories.values()):
        raise InvalidRequestError("invalid_prompt", "prompt holds half of a surrogate pair.", param="prompt")
    if any(kind == "Cc" and c not in _ALLOWED_CONTROLS for c, kind in categories.items()):
        raise InvalidRequestError("invalid_prompt", "prompt holds control characters.", param="prompt")
    if all(kind in _INVISIBLE for kind in categories.values()):
        raise InvalidRequestError("empty_prompt", "prompt must say what to draw.", param="prompt")

"""Which texts are prompts at all, before any model is asked."""

from __future__ import annotations

import unicodedata

from server.errors import InvalidRequestError
from server.schemas import MAX_PROMPT_CHARS

_ALLOWED_CONTROLS = frozenset("\t\n\r")
_INVISIBLE = frozenset({"Cf", "Zs", "Zl", "Zp", "Cc"})


def check_prompt(prompt: str, param: str = "prompt") -> None:
    """param: its field. Raises: InvalidRequestError when empty, too long or not text. It is never changed."""
    if len(prompt) > MAX_PROMPT_CHARS:
        message = f"{param} must be at most {MAX_PROMPT_CHARS} characters."
        raise InvalidRequestError("prompt_too_long", message, param=param)
    categories = {c: unicodedata.category(c) for c in set(prompt)}
    if any(kind == "Cs" for kind in categories.values()):
        raise InvalidRequestError("invalid_prompt", f"{param} holds half of a surrogate pair.", param=param)
    if any(kind == "Cc" and c not in _ALLOWED_CONTROLS for c, kind in categories.items()):
        raise InvalidRequestError("invalid_prompt", f"{param} holds control characters.", param=param)
    if all(kind in _INVISIBLE for kind in categories.values()):
        raise InvalidRequestError("empty_prompt", f"{param} must say what to draw.", param=param)

"""JSON of requests and answers, read and written in one place."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def loads(data: bytes | str) -> Any:
    """What JSON says; of a repeated key the last value.

    Raises ValueError for what is no JSON, for NaN and the infinities, for lone surrogates, and for nesting that is too
    deep to be read.
    """
    try:
        value = json.loads(data, parse_constant=_refuse)
        escapes = ("\\ud", "\\uD") if isinstance(data, str) else (b"\\ud", b"\\uD")
        if any(escape in data for escape in escapes):  # type: ignore[operator]
            # A surrogate, alone or one of a pair: only what is whole can be written as UTF-8.
            dumps(value)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    return value


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """``value`` as compact JSON in UTF-8. Raises ValueError for what JSON or UTF-8 cannot express."""
    try:
        return json.dumps(
            value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys
        ).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")

"""JSON of requests and answers, read and written in one place."""

from __future__ import annotations

import json
from typing import Any

import orjson

_SORTED = orjson.OPT_SORT_KEYS


def loads(data: bytes | str) -> Any:
    """What JSON says; of a repeated key the last value.

    Raises ValueError for what is no JSON, for NaN and the infinities, for lone surrogates, and for nesting that is too
    deep to be read.
    """
    return orjson.loads(data)


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """``value`` as compact JSON in UTF-8; NaN is null. Raises ValueError for what JSON or UTF-8 cannot express."""
    try:
        return orjson.dumps(value, option=_SORTED if sort_keys else None)
    except TypeError:
        # An integer of more than 64 bits is JSON, too.
        return _slowly(value, sort_keys)


def _slowly(value: Any, sort_keys: bool) -> bytes:
    try:
        return json.dumps(
            value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys
        ).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None

"""JSON of requests and answers, read and written in one place."""

from __future__ import annotations

import json
from typing import Any

import orjson

_SORTED = orjson.OPT_SORT_KEYS
# Of a request. A million takes a tenth of a gigabyte when it is read; a conversation that fills the largest models has
# less than a tenth of that.
MOST_VALUES = 1_000_000
# A value begins after each of these, but for those within texts.
_BEGINNINGS = b",[{"
_OTHERS = bytes(byte for byte in range(256) if byte not in _BEGINNINGS)
_OTHERS_THAN_TEXTS = bytes(byte for byte in _OTHERS if byte not in b'"')


def loads(data: bytes | str) -> Any:
    """What JSON says; of a repeated key the last value.

    Raises ValueError for what is no JSON, for NaN and the infinities, for lone surrogates, and for nesting that is too
    deep to be read.
    """
    return orjson.loads(data)


def has_most(data: bytes, most: int = MOST_VALUES) -> bool:
    """Whether JSON has at most ``most`` values, without reading any: an empty list takes two bytes or three, and thirty
    times as much when it has been read."""
    # The shortest value is a digit and a comma. Then the texts are looked into only where that matters.
    if len(data) < 2 * most or len(data.translate(None, _OTHERS)) < most:
        return True
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _OTHERS_THAN_TEXTS)
    if plain.count(b'"') > 4 * most:  # a value has one text, its name another
        return False
    return sum(map(len, plain.split(b'"')[::2])) < most


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

"""JSON with texts that are no Unicode: what a tool gives, such as the name of a file, may hold lone surrogates.

JSON can write them, as ``\\udcff``, and so they are accepted and kept; UTF-8 cannot, and most encoders and parsers
refuse them. NaN and the infinities are no JSON at all.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

M = TypeVar("M", bound=BaseModel)


def encode(value: Any) -> bytes:
    """``value`` as JSON. Raises ValueError for NaN, TypeError for what JSON has no form of, RecursionError."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def finite(value: Any) -> Any:
    """``value`` with the texts ``NaN``, ``Infinity`` and ``-Infinity`` where it has these numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def is_text(value: str) -> bool:
    """Whether every database can store ``value`` as a text: it has no lone surrogate and no NUL."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def dump(model: BaseModel) -> str:
    """A model as JSON, in which non-ASCII texts may be escaped."""
    try:
        return model.model_dump_json()
    except PydanticSerializationError:
        return json.dumps(model.model_dump(mode="json"), allow_nan=False)


class Raw:
    """What is JSON already, as a part of what is written by `join`."""

    __slots__ = ("content",)

    def __init__(self, content: str):
        self.content = content


def join(value: Any) -> bytes:
    """``value`` as JSON, with parts that are `Raw`. Times, in UTC, are written as in a model."""
    try:
        return orjson.dumps(value, default=_fragment, option=orjson.OPT_UTC_Z)
    except TypeError:  # it has lone surrogates, or an integer of more than 64 bits
        return json.dumps(value, default=_plain, allow_nan=False).encode()


def _fragment(value: Any) -> Any:
    if isinstance(value, Raw):
        return orjson.Fragment(value.content)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, Raw):
        return json.loads(value.content)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def parse(kind: type[M], content: str | bytes) -> M:
    """The model that JSON is of. Raises ValidationError, or ValueError where it is no JSON."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        if all(each["type"] != "json_invalid" for each in error.errors(include_url=False, include_input=False)):
            raise
    return kind.model_validate(json.loads(content))

"""JSON with texts that are no Unicode: what a tool gives, such as the name of a file, may hold lone surrogates.

JSON can write them, as ``\\udcff``, and so they are accepted and kept; UTF-8 cannot, and most encoders and parsers
refuse them. NaN and the infinities are no JSON at all.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

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


def parse(kind: type[M], content: str | bytes) -> M:
    """The model that JSON is of. Raises ValidationError, or ValueError where it is no JSON."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        if all(each["type"] != "json_invalid" for each in error.errors(include_url=False, include_input=False)):
            raise
    return kind.model_validate(json.loads(content))

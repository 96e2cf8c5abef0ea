"""`python clients/typescript/generate.py`: write src/schema.ts and src/problems.ts from what the service answers.

The types are those of the service's OpenAPI document that the client's routes need. The classes of errors are those of
`agentstate.errors` that the service answers with. Both are committed, and a test compares them with the service.

A small generator of our own: the schemas are Pydantic's, which use a small part of JSON Schema, and the client needs
types alone. It raises ValueError at a schema that it cannot express.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:  # as a program, it runs without an installed service
    sys.path.insert(0, str(ROOT))

from agentstate import errors  # noqa: E402
from agentstate.api.app import create_app  # noqa: E402
from agentstate.api.problems import STATUS  # noqa: E402
from agentstate.settings import Settings  # noqa: E402

HEADER = "// Written by generate.py from the service. Do not edit.\n"
# The client speaks of sessions. A program calls the gateway's routes with a client of OpenAI's or Anthropic's.
LEFT_OUT = ("gateway", "health")
# How a schema may be refined. Types do not say it; descriptions do, where it matters.
REFINEMENTS = {
    *("title", "description", "default", "examples", "format", "pattern", "repr"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "gt", "ge", "lt", "le"),
    *("minLength", "maxLength", "minItems", "maxItems"),
}
PRIMITIVES = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
WIDTH = 116


def schema(document: dict[str, Any]) -> str:
    """The module of types for an OpenAPI document."""
    schemas = document["components"]["schemas"]
    wanted: set[str] = set()
    pending = {
        name
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if path.startswith("/v1/") and not set(operation.get("tags", ())) & set(LEFT_OUT)
        for name in _references(operation)
    }
    while pending:
        wanted |= pending
        pending = {name for found in pending for name in _references(schemas[found])} - wanted
    return HEADER + "".join("\n" + _declaration(name, schemas[name]) for name in sorted(wanted))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rpartition("/")[2]
            elif key != "examples":
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _declaration(name: str, found: dict[str, Any]) -> str:
    about = _comment(found.get("description", ""), "")
    if "properties" not in found:
        return f"{about}export type {name} = {_type(found)};\n"
    needed = set(found.get("required", ()))
    lines = [f"{about}export interface {name} {{\n"]
    for field, inner in found["properties"].items():
        lines.append(_comment(next(_descriptions(inner), ""), "  "))
        lines.append(f"  {field}{'' if field in needed else '?'}: {_type(inner)};\n")
    if found.get("additionalProperties") is True:
        lines.append("  [more: string]: unknown;\n")
    return "".join([*lines, "}\n"])


def _descriptions(found: dict[str, Any]) -> Iterator[str]:
    for each in (found, *found.get("anyOf", ())):
        if "description" in each:
            yield each["description"]


def _type(found: dict[str, Any]) -> str:
    own = {key: value for key, value in found.items() if key not in REFINEMENTS}
    match own:
        case {"$ref": reference, **rest} if not rest:
            return str(reference).rpartition("/")[2]
        case {"anyOf": kinds, **rest} if not rest:
            return " | ".join(dict.fromkeys(map(_type, kinds)))
        case {"const": constant, "type": _, **rest} if not rest:
            return json.dumps(constant)
        case {"enum": values, "type": "string", **rest} if not rest:
            return " | ".join(map(json.dumps, values))
        case {"type": "array", "items": items, **rest} if not rest:
            inner = _type(items)
            return f"{f'({inner})' if ' ' in inner else inner}[]"
        case {"type": "object", "additionalProperties": True, **rest} if not rest:
            return "Record<string, unknown>"
        case {"type": "object", "additionalProperties": dict(inner), "propertyNames": {"enum": names}, **rest} if (
            not rest
        ):
            return f"Partial<Record<{' | '.join(map(json.dumps, names))}, {_type(inner)}>>"
        case {"type": "object", "additionalProperties": dict(inner), **rest} if not rest:
            return f"Record<string, {_type(inner)}>"
        case {"type": str(kind), **rest} if not rest and kind in PRIMITIVES:
            return PRIMITIVES[kind]
        case {} if not own:
            return "unknown"
    raise ValueError(f"this schema has no type here: {json.dumps(found)}")


def problems() -> str:
    """The module of error classes: a class for every problem of the session API."""
    answered = [kind for kind in _tree(errors.AgentStateError) if _is_told(kind)]
    told = {kind: None for found in answered for kind in reversed(found.__mro__[: found.__mro__.index(Exception)])}
    parts = [HEADER, 'import { AgentStateError } from "./errors.js";\n']
    for kind in told:
        if kind is not errors.AgentStateError:
            (base,) = kind.__bases__
            summary = (kind.__doc__ or "").partition("\n")[0].replace("`", "'")
            parts.append(
                f"\n/** {summary} */\nexport class {kind.__name__} extends {base.__name__} {{\n"
                f"  static override readonly code: string = {json.dumps(kind.slug())};\n"
                f"  static override readonly summary: string = {json.dumps(summary)};\n"
                f"  static override readonly retryable: boolean = {json.dumps(kind.retryable)};\n}}\n"
            )
    return "".join(parts)


def _is_told(kind: type[errors.AgentStateError]) -> bool:
    if kind in (errors.AgentStateError, errors.SessionError, errors.ResponseNotFound):
        return False
    # What the client itself raises.
    clients = (errors.EngineUnreachable, errors.NotAgentState, errors.RequestRefused, errors.ServiceUnreachable)
    answered = [base for base in kind.__mro__ if base in STATUS and base is not errors.AgentStateError]
    return kind in clients or bool(answered)


def _tree(root: type[errors.AgentStateError]) -> Iterator[type[errors.AgentStateError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)


def _comment(text: str, indent: str) -> str:
    text = text.strip().replace("``", "`").replace("*/", "* /")
    if not text:
        return ""
    if "\n" not in text and len(text) + len(indent) + 7 <= WIDTH:
        return f"{indent}/** {text} */\n"
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and len(line) + len(word) + len(indent) + 4 > WIDTH:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".lstrip()
        lines.append(line)
    return f"{indent}/**\n" + "".join(f"{indent} * {line}".rstrip() + "\n" for line in lines) + f"{indent} */\n"


def written() -> dict[Path, str]:
    """The content that each generated file should have."""
    document = create_app(Settings()).openapi()
    return {HERE / "src" / "schema.ts": schema(document), HERE / "src" / "problems.ts": problems()}


if __name__ == "__main__":
    for path, content in written().items():
        path.write_text(content)

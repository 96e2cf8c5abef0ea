"""``/docs``: the OpenAPI document as one self-contained page, for machines without internet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

router = APIRouter()

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: 4px; }
details { border-bottom: 1px solid #8884; padding: .4rem 0; }
summary { cursor: pointer; }
table { border-collapse: collapse; }
td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
:root { color-scheme: light dark; }
"""
# The browser fetches nothing, whatever a description contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@router.get("/docs", include_in_schema=False)
async def read(request: Request) -> HTMLResponse:
    """The reference page."""
    return HTMLResponse(_page(request.app.openapi()), headers={"Content-Security-Policy": _POLICY})


def _page(document: dict[str, Any]) -> str:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        f"<p>{escape(document['info'].get('description', ''))}</p>",
        "<p>The same for programs: <a href=openapi.json>openapi.json</a></p>",
    ]
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append("".join(_operation(document, method, path, operation)))
    for tag, operations in by_tag.items():
        parts += [f"<h2>{escape(tag)}</h2>", *operations]
    parts.append("<h2>schemas</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        shown = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        parts.append(
            f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary><pre>{shown}</pre></details>'
        )
    return "".join(parts)


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<details><summary><span class=method>{escape(method.upper())}</span><code>{escape(path)}</code></summary>"
    yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
    parameters = operation.get("parameters", [])
    if parameters:
        yield "<table>"
        for parameter in parameters:
            needed = ", needed" if parameter.get("required") else ""
            yield (
                f"<tr><td><code>{escape(parameter['name'])}</code><td>{escape(parameter['in'])}{needed}"
                f"<td>{escape(parameter.get('description', ''))}"
            )
        yield "</table>"
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body, {escape(media)}: {_links(content.get('schema', {}))}</p>"
        for example in _resolved(document, content.get("schema", {})).get("examples", [])[:1]:
            yield f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"
    yield "<table>"
    for status, response in operation["responses"].items():
        schemas = " ".join(_links(content.get("schema", {})) for content in response.get("content", {}).values())
        yield f"<tr><td>{escape(status)}<td>{escape(response.get('description', ''))}<td>{schemas}"
    yield "</table></details>"


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference, also a nullable one, points to; else the schema itself."""
    names = _names(schema)
    return document["components"]["schemas"][names[0]] if names else schema


def _names(schema: dict[str, Any]) -> list[str]:
    found = [schema, *schema.get("anyOf", ())]
    return [one["$ref"].rpartition("/")[2] for one in found if "$ref" in one]


def _links(schema: dict[str, Any]) -> str:
    return " or ".join(f'<a href="#{escape(name)}"><code>{escape(name)}</code></a>' for name in _names(schema))

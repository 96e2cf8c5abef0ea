"""The pages of the documentation that are written from the code: settings, commands, HTTP API, errors, metrics.

They are made for every build of the site (`site_pages.py`), and not committed: the code is what has them right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import typer
from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from pydantic import ByteSize, SecretStr

from agentstate import errors
from agentstate.api import problems
from agentstate.api.app import create_app
from agentstate.api.metrics import Metrics
from agentstate.cli.main import app
from agentstate.errors import AgentStateError
from agentstate.fleet.engines import Engine
from agentstate.settings import Settings
from engine_patch.metrics import Metrics as EngineMetrics


def settings() -> str:
    """Every variable, its default and its meaning."""
    rows = [
        (f"`AGENTSTATE_{name.upper()}`", _shown(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Every process reads its settings from these variables when it starts; none is needed.",
            "`agentstate settings` prints them with their values. [Configuration](../configuration.md) says how they",
            "work together.",
            "",
            *_table(("variable", "default", "meaning"), rows),
        ]
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    if isinstance(value, ByteSize):
        return f"`{value.human_readable(separator='')}`"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "" if value in (None, "") else f"`{value}`"


def commands() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        "`agentstate COMMAND --help` prints the same. Settings are [variables](settings.md).",
    ]
    for words, command in _leaves("agentstate", typer.main.get_command(app)):
        lines += ["", f"## `{words}`", "", *_prose(command.help or "")]
        rows = []
        for parameter in command.params:
            if parameter.name in ("help", "install_completion", "show_completion"):
                continue
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            if parameter.param_type_name == "argument":
                names = f"`{parameter.name.upper()}`"
            default = parameter.default if not callable(parameter.default) else None
            of_default = "" if default in (None, "", False, ()) else _shown(default)
            rows.append((names, of_default, getattr(parameter, "help", None) or ""))
        if rows:
            lines += ["", *_table(("argument or option", "default", "meaning"), rows)]
    return "\n".join(lines)


def _leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, each in inner.items():
        if not each.hidden:
            yield from _leaves(f"{words} {name}", each)


def http_api() -> str:
    """Every route, and the documents that it takes and gives."""
    document = create_app(Settings()).openapi()
    lines = [
        "# HTTP routes",
        "",
        "What a running service documents itself at `/docs` and `/openapi.json`. [The HTTP API](../http-api.md) has",
        "the rules that hold for all routes, and [errors](errors.md) the problems that they answer.",
    ]
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault((operation.get("tags") or ["other"])[0], []).extend(_route(method, path, operation))
    for tag, routes in by_tag.items():
        lines += ["", f"## {tag[0].upper()}{tag[1:]}", *routes]
    lines += ["", "## Documents"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += ["", f"### {name}", "", *_prose(schema.get("description", ""))]
        if "properties" not in schema:
            lines.append(f"One of {', '.join(f'`{value}`' for value in schema.get('enum', ()))}.")
            continue
        needed = set(schema.get("required", ()))
        rows = [
            (f"`{field}`", _kind(inner) + ("" if field in needed else ", optional"), _description(inner))
            for field, inner in schema["properties"].items()
        ]
        lines += _table(("field", "is", "meaning"), rows)
    return "\n".join(lines)


def _route(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"### `{method.upper()} {path}`", "")
    yield from _prose(operation.get("description") or operation.get("summary", ""))
    parameters = [
        (f"`{each['name']}`", each["in"], each.get("description", "")) for each in operation.get("parameters", ())
    ]
    if parameters:
        yield from ("", *_table(("parameter", "in", "meaning"), parameters))
    body = operation.get("requestBody", {}).get("content", {})
    for content in body.values():
        yield from ("", f"Takes {_kind(content.get('schema', {}))}.")
    rows = []
    for status, response in operation["responses"].items():
        kinds = {_kind(content.get("schema", {})) for content in response.get("content", {}).values()}
        rows.append((status, response.get("description", ""), ", ".join(sorted(kinds))))
    yield from ("", *_table(("status", "means", "gives"), rows))


def _kind(schema: dict[str, Any]) -> str:
    """A schema in words, with links to the documents of this page."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_kind, schema["anyOf"])))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _description(schema: dict[str, Any]) -> str:
    told = [schema, *schema.get("anyOf", ())]
    return next((each["description"] for each in told if "description" in each), "")


def errors_page() -> str:
    """Every problem that the service answers."""
    rows = []
    for kind in _tree(AgentStateError):
        status = next((problems.STATUS[base] for base in kind.__mro__ if base in problems.STATUS), None)
        if status is not None and problems.STATUS.get(errors.AgentStateError) is not status:
            meaning = (kind.__doc__ or "").partition("\n")[0]
            rows.append((f"`{kind.slug()}`", str(int(status)), "yes" if kind.retryable else "", meaning))
    others = re.findall(r"``([a-z-]+)``", (problems.__doc__ or "").partition("requests:")[2])
    return "\n".join(
        [
            "# Errors",
            "",
            "The `type` of a problem is `/problems/` and one of these. The Python and the TypeScript client raise the",
            "class of the same name: `lease-lost` is `LeaseLost`. *Retry*: the same request may succeed later.",
            "",
            *_table(("problem", "status", "retry", "means"), sorted(rows)),
            "",
            f"About requests as such: {', '.join(f'`{name}`' for name in others)}.",
        ]
    )


def _tree(root: type[AgentStateError]) -> Iterator[type[AgentStateError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)


class _Nothing:
    """Stands in for what a service counts: its metrics are described, not read."""

    def __getattr__(self, name: str) -> Any:
        return _Nothing()

    def __call__(self) -> Any:
        return self

    copy = items = values = __call__

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def metrics() -> str:
    """Every metric of the service and of an engine."""
    of_service = Metrics(_Nothing()).registry.collect()  # type: ignore[arg-type]
    return "\n".join(
        [
            "# Metrics",
            "",
            "For Prometheus. The names of counters end with `_total`; a histogram has `_bucket`, `_sum` and `_count`.",
            "",
            "## The service",
            "",
            "At its `/metrics`.",
            "",
            *_metrics(of_service),
            "",
            "## An engine",
            "",
            "At SGLang's `/metrics`, with `--enable-metrics`. Every metric has `model_name` and `tp_rank`.",
            "",
            *_metrics(_of_engine()),
        ]
    )


@cache
def _of_engine() -> list[Metric]:
    # Of the process's registry, in which a metric can be made once.
    EngineMetrics(Engine("e", "n", 0, "", "", "", "m", "", ""))
    return [metric for metric in REGISTRY.collect() if metric.name.startswith("agentstate:")]


def _metrics(found: Iterable[Metric]) -> list[str]:
    rows = []
    for metric in found:
        name = metric.name + ("_total" if metric.type == "counter" else "")
        rows.append((f"`{name}`", metric.type, metric.documentation))
    return _table(("metric", "is a", "of"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def row(cells: tuple[str, ...]) -> str:
        texts = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return [row(head), "|" + "---|" * len(head), *map(row, rows)]


def _prose(text: str) -> list[str]:
    return [line.strip().replace("``", "`").replace("<", "&lt;") for line in text.splitlines()]


PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings,
    "reference/commands.md": commands,
    "reference/http-routes.md": http_api,
    "reference/errors.md": errors_page,
    "reference/metrics.md": metrics,
}

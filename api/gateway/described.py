"""The gateway's routes in the service's OpenAPI document.

OpenAI and Anthropic describe their APIs; here stands which of their routes there are, what the gateway itself asks of a
body, and in what form it refuses. Whatever else a body has is the engine's to judge.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from agentstate.fleet.hints import MAX_ACTIONS

_TAG = "gateway"
_SESSION = {
    "name": "x-agentstate-session",
    "in": "header",
    "required": False,
    "description": "The session that the request is a turn of, percent-encoded; made on first sight.",
    "schema": {"type": "string"},
}
_OPENAI_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
_STATUSES = {
    400: "Malformed, or not fitting the session",
    401: "A valid API key is needed",
    403: "Without API keys the service is for this machine only",
    404: "No such model, response, conversation or item",
    405: "Another method",
    408: "The body did not come in time",
    409: "The session that the client names is being run",
    410: "The session has expired",
    413: "The body is too large",
    415: "The body is compressed",
    422: "The engine cannot use the request",
    429: "Too many requests",
    431: "The headers are too large",
    502: "The engine broke off, or cannot be reached",
    503: "No engine is live, or the database does not answer",
    504: "The engine sent nothing for too long",
}
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_MODEL = {"type": ["string", "null"]}
_HINT = {"action_id": {"type": "string"}, "action_type": {"type": "string"}, "action_version": {"type": "string"}}
_HINTS = {
    "type": ["object", "null"],
    "description": "What is known of the session's next request; x-agentstate-kv-hints says what becomes of it.",
    "properties": {
        "protocol_version": {"type": "string"},
        "message_id": {"type": "string"},
        "actions": {
            "type": "array",
            "maxItems": MAX_ACTIONS,
            "items": {
                "type": "object",
                "properties": {**_HINT, "payload": {"type": "object"}},
                "required": list(_HINT),
            },
        },
    },
    "required": ["protocol_version", "message_id"],
}
_TURN: dict[str, Any] = {
    "model": _MODEL,
    "stream": {"description": "A boolean: the engine judges it."},
    "kv_hints": _HINTS,
}


def install(app: FastAPI) -> None:
    """Add the gateway's routes to the OpenAPI document of ``app``."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document["paths"].update(PATHS)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(GatewayError=_OPENAI_ERROR, MessagesError=_ANTHROPIC_ERROR)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _operation(
    operation_id: str,
    summary: str,
    *,
    body: dict[str, Any] | None = None,
    required: tuple[str, ...] = (),
    path: tuple[str, ...] = (),
    turn: bool = False,
    anthropic: bool = False,
) -> dict[str, Any]:
    """One operation. A ``turn`` may name its session, and may be answered by a stream."""
    error = {"$ref": f"#/components/schemas/{'MessagesError' if anthropic else 'GatewayError'}"}
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if turn:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "tags": [_TAG],
        "summary": summary,
        "operationId": operation_id,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}}
            for name in path
        ],
        "responses": {
            "200": {"description": "As its API has it", "content": answer},
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in _STATUSES.items()
            },
        },
    }
    if turn:
        operation["parameters"].append(_SESSION)
    if body is not None:
        schema = {"type": "object", "properties": body, "required": list(required)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


PATHS: dict[str, Any] = {
    "/v1/chat/completions": {
        "post": _operation(
            "create_chat_completion",
            "OpenAI's chat completions",
            body={**_TURN, "messages": _OBJECTS},
            required=("messages",),
            turn=True,
        )
    },
    "/v1/completions": {
        "post": _operation("create_completion", "OpenAI's completions", body=_TURN, turn=True),
    },
    "/v1/messages": {
        "post": _operation(
            "create_message",
            "Anthropic's Messages",
            body={**_TURN, "messages": _OBJECTS},
            required=("messages",),
            turn=True,
            anthropic=True,
        )
    },
    "/v1/messages/count_tokens": {
        "post": _operation(
            "count_message_tokens", "Anthropic's count of tokens", body={"model": _MODEL}, anthropic=True
        )
    },
    "/v1/responses": {
        "post": _operation(
            "create_response",
            "OpenAI's Responses: what is stored is a session's transcript",
            body={
                **_TURN,
                "input": {"type": "string"},
                "store": {"type": ["boolean", "null"]},
                "previous_response_id": {"type": ["string", "null"]},
            },
            required=("input",),
            turn=True,
        )
    },
    "/v1/responses/{response_id}": {
        "get": _operation("read_response", "A stored response", path=("response_id",)),
        "delete": _operation("delete_response", "Forget a stored response", path=("response_id",)),
    },
    "/v1/responses/{response_id}/input_items": {
        "get": _operation("list_response_input", "What a stored response was made of", path=("response_id",))
    },
    "/v1/conversations": {
        "post": _operation("create_conversation", "OpenAI's Conversations: each is a session", body={})
    },
    "/v1/conversations/{conversation_id}": {
        "get": _operation("read_conversation", "A conversation", path=("conversation_id",)),
        "post": _operation("update_conversation", "Its metadata", body={}, path=("conversation_id",)),
        "delete": _operation("delete_conversation", "Delete it, with its items", path=("conversation_id",)),
    },
    "/v1/conversations/{conversation_id}/items": {
        "get": _operation("list_items", "The items of a conversation", path=("conversation_id",)),
        "post": _operation(
            "create_items", "Append items", body={"items": _OBJECTS}, required=("items",), path=("conversation_id",)
        ),
    },
    "/v1/conversations/{conversation_id}/items/{item_id}": {
        "get": _operation("read_item", "An item", path=("conversation_id", "item_id")),
        "delete": _operation("delete_item", "Hide an item from now on", path=("conversation_id", "item_id")),
    },
    "/v1/models": {"get": _operation("list_models", "The models of live engines")},
    "/v1/models/{model}": {"get": _operation("read_model", "A model of a live engine", path=("model",))},
    "/v1/embeddings": {"post": _operation("create_embeddings", "Passed on", body={"model": _MODEL})},
    "/v1/rerank": {"post": _operation("rerank", "Passed on", body={"model": _MODEL})},
    "/tokenize": {"post": _operation("tokenize", "Passed on", body={"model": _MODEL})},
}

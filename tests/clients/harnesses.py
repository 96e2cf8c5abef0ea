"""Programs that run agents and say, with every request, whose it is."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import uuid
from pathlib import Path
from typing import Any

from conversations import TOKENS, Reply, Server
from models import words
from prompts import prompt

SYSTEM = words(prompt(9710, 20))
TOOL = {"name": "Bash", "description": "Runs a command", "input_schema": {"type": "object", "properties": {}}}


class ClaudeCode:
    """A conversation in the form in which Claude Code's documentation of gateways gives its requests: streamed, with
    ids in headers and in the body, and with a system prompt whose first block differs from request to request.
    ``agent`` names a subagent."""

    def __init__(self, server: Server, session: str | None = None, agent: str | None = None, system: str = SYSTEM):
        from anthropic import Anthropic

        self.session = session or str(uuid.uuid4())
        self.server = server
        self._agent = agent
        self._system = system
        self._client = Anthropic(base_url=server.url, auth_token=server.key)
        self._messages: list[Any] = []

    def beside(self, agent: str | None = None, system: str = SYSTEM) -> ClaudeCode:
        """Another conversation under the same session's id."""
        return ClaudeCode(self.server, self.session, agent, system)

    def say(self, text: str) -> Reply:
        self._messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        said, cached = "", None
        with self._client.beta.messages.create(stream=True, **self._request(), max_tokens=TOKENS) as events:
            for event in events:
                if event.type == "content_block_delta":
                    said += event.delta.text
                elif event.type in ("message_start", "message_delta"):
                    usage = event.message.usage if event.type == "message_start" else event.usage
                    cached = usage.cache_read_input_tokens or cached
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        return Reply(said, cached)

    def count_tokens(self, text: str) -> int:
        """Of the prompt that `say` would send."""
        request = self._request()
        del request["extra_body"], request["metadata"]
        request["messages"] = [*self._messages, {"role": "user", "content": text}]
        return int(self._client.beta.messages.count_tokens(**request).input_tokens)

    def _request(self) -> dict[str, Any]:
        billing = f"cc_version=2.1.177.{secrets.token_hex(2)[:3]}; cc_entrypoint=cli; cch={secrets.token_hex(3)[:5]};"
        headers = {"X-Claude-Code-Session-Id": self.session, "x-app": "cli"}
        if self._agent is not None:
            headers["x-claude-code-agent-id"] = self._agent
        return {
            "model": self.server.model,
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: {billing}"},
                {"type": "text", "text": self._system, "cache_control": {"type": "ephemeral"}},
            ],
            "messages": self._messages,
            "tools": [TOOL],
            "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": self.session})},
            "betas": ["claude-code-20250219"],
            "extra_headers": headers,
            "extra_body": {"temperature": 0, "context_management": {"edits": []}},
        }


class OpenCode:
    """A conversation of OpenCode, a process a turn, which keeps everything below ``home``. ``prompt_tokens`` is how
    many tokens its last prompt had."""

    def __init__(self, server: Server, programs: Path, home: Path):
        self._command = [programs / "opencode", "run", "--format", "json"]
        options = {"baseURL": f"{server.url}/v1", "apiKey": server.key}
        model = {"limit": {"context": 8192, "output": TOKENS}, "options": {"temperature": 0}}
        provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {server.model: model}}
        configuration = {"provider": {"local": provider}, "model": f"local/{server.model}", "autoupdate": False}
        self._home = home
        self._environment = {
            **{f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "STATE")},
            "OPENCODE_CONFIG_CONTENT": json.dumps(configuration),
            "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
            "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
        }
        self.session: str | None = None
        self.prompt_tokens = 0

    def say(self, text: str) -> Reply:
        again = [] if self.session is None else ["--session", self.session]
        events = _run([*self._command, *again, text], self._home, self._environment)
        assert not [event for event in events if event["type"] == "error"], events
        self.session = events[0]["sessionID"]
        parts = [event["part"] for event in events]
        (finish,) = (part for part in parts if part["type"] == "step-finish")
        tokens = finish["tokens"]
        self.prompt_tokens = tokens["input"] + tokens["cache"]["read"]
        return Reply("".join(part["text"] for part in parts if part["type"] == "text"), tokens["cache"]["read"])


class Codex:
    """A conversation of Codex, a process a turn, which keeps everything below ``home``. ``prompt_tokens`` is how many
    tokens its last prompt had."""

    def __init__(self, server: Server, programs: Path, home: Path):
        self._command = [programs / "codex", "exec", "--json", "--skip-git-repo-check"]
        provider = {"name": "local", "base_url": f"{server.url}/v1", "env_key": "LOCAL_KEY", "wire_api": "responses"}
        configuration = {"model": server.model, "model_provider": "local"}
        configuration |= {f"model_providers.local.{key}": value for key, value in provider.items()}
        lines = [f"{key} = {json.dumps(value)}" for key, value in configuration.items()]
        (home / "config.toml").write_text("\n".join(lines))
        self._home = home
        self._environment = {"CODEX_HOME": str(home), "LOCAL_KEY": server.key}
        self.session: str | None = None
        self.prompt_tokens = 0
        # What it prints of a turn counts the turns before it too.
        self._input_tokens = self._cached_tokens = 0

    def say(self, text: str) -> Reply:
        again = [] if self.session is None else ["resume", self.session]
        events = _run([*self._command, *again, text], self._home, self._environment)
        assert not [event for event in events if event["type"] in ("error", "turn.failed")], events
        self.session = next(event["thread_id"] for event in events if event["type"] == "thread.started")
        items = [event["item"] for event in events if event["type"] == "item.completed"]
        (usage,) = (event["usage"] for event in events if event["type"] == "turn.completed")
        self.prompt_tokens = usage["input_tokens"] - self._input_tokens
        cached = usage["cached_input_tokens"] - self._cached_tokens
        self._input_tokens, self._cached_tokens = usage["input_tokens"], usage["cached_input_tokens"]
        said = "".join(item["text"] for item in items if item["type"] == "agent_message")
        return Reply(said, cached)


def _run(command: list[Any], home: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The events that a program prints, which knows nothing of who started it."""
    project = home / "project"
    project.mkdir(exist_ok=True)
    ran = subprocess.run(
        command,
        cwd=project,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return [json.loads(line) for line in ran.stdout.splitlines()]

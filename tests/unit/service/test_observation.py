from __future__ import annotations

import json
import logging
import sys

import pytest

from agentstate.api.observation import JsonFormatter, RequestContext, TextFormatter


def record(message: str, *arguments: object, failed: str | None = None) -> logging.LogRecord:
    trouble = None
    if failed is not None:
        try:
            raise RuntimeError(failed)
        except RuntimeError:
            trouble = sys.exc_info()
    made = logging.LogRecord("agentstate", logging.ERROR, __file__, 1, message, arguments, trouble)
    RequestContext().filter(made)
    return made


@pytest.mark.parametrize("formatter", [TextFormatter({"hunter2"}), JsonFormatter({"hunter2"})], ids=["text", "json"])
@pytest.mark.parametrize(
    "line",
    [
        record("the password is hunter2"),
        record("cannot reach %s", "postgresql://ada:hunter2@db/agents"),
        record("cannot reach %s", "postgresql://db/agents?user=ada&password=hunter2"),
        record("Authorization: Bearer hunter2"),
        record("%(header)s", {"header": "bearer hunter2-and-more"}),
        record("the key ags_hunter2x was shown"),
        record("it failed", failed="host=db password=hunter2 dbname=x"),
    ],
    ids=lambda line: line.getMessage()[:20],
)
def test_no_line_of_the_log_has_a_secret(formatter: logging.Formatter, line: logging.LogRecord) -> None:
    text = formatter.format(line)
    assert "hunter2" not in text and "***" in text
    if isinstance(formatter, JsonFormatter):
        json.loads(text)

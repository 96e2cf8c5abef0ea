"""What the rules and the board in `deploy/` ask Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
BOARD = json.loads((DEPLOY / "grafana/agentstate.json").read_text())
# Prometheus' own, of every series.
TARGET_LABELS = {"instance", "job"}


def queries() -> dict[str, str]:
    """Every query, by where it is."""
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    found = {f"alert {rule['alert']}": rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    found["variable model"] = BOARD["templating"]["list"][1]["definition"]
    return found


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"\bagentstate[_:]\w+", query))


def labels_of(query: str) -> set[str]:
    """The labels that it selects or groups by, but for those of the target."""
    selected = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query)
    grouped = [name for names in re.findall(r"\bby\s*\(([^)]*)\)", query) for name in re.findall(r"\w+", names)]
    return {*selected, *grouped} - TARGET_LABELS


def exposed(name: str, kind: str) -> set[str]:
    """The names of the series of a metric, as its client declares it."""
    base = name.removesuffix("_total")
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
    return {base + suffix for suffix in suffixes}

"""The documentation as a site: every page has its place, every link leads somewhere, and nothing comes from elsewhere.

Also what its pages say that code can check: messages that they quote, names of metrics and settings, sums.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from agentstate.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / ".ci"))

import reference  # noqa: E402
import site_pages  # noqa: E402

# What a browser fetches by itself, unlike what it follows when somebody clicks.
FETCHED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("link", "href"), ("iframe", "src")}


@dataclass
class Page(HTMLParser):
    """The ids of a page, and its links with what they are of."""

    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src", "srcset") and value:
                self.links.append((tag, name, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_pages.build(tmp_path_factory.mktemp("site") / "build")


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {}
    for file in site.rglob("*.html"):
        found[file] = Page()
        found[file].feed(file.read_text())
    return found


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for file, page in pages.items():
        if file.name == "404.html":  # its links are from the root of a server
            continue
        for _, _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                wrong.append(f"{file.relative_to(site)}: {link} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{file.relative_to(site)}: {link} has no such place")
    assert not wrong, "\n".join(wrong)
    assert len(pages) > 20


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for tag, name, link in page.links:
            if (tag, name) in FETCHED:
                assert not urlsplit(link).netloc, f"{file.name}: {link}"


def test_every_page_has_its_place() -> None:
    placed = set(_places(site_pages.NAV))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= placed
    assert set(reference.PAGES) <= placed


def _places(nav: dict[str, Any]) -> Iterator[str]:
    for inner in nav.values():
        if isinstance(inner, dict):
            yield from _places(inner)
        else:
            yield inner


def test_a_link_to_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    monkeypatch.setattr(site_pages, "ROOT", root)
    monkeypatch.setattr(site_pages, "DOCS", root / "docs")
    monkeypatch.setattr(reference, "PAGES", {})
    (root / "docs/a.md").write_text("# A\n\n```\n[code](nowhere.md)\n```\n\n[there](../x.py)\n")
    (root / "x.py").write_text("pass\n")
    built = site_pages.build(tmp_path / "build")
    assert 'href="repository/x.py.html"' in (built / "a.html").read_text()
    (root / "docs/a.md").write_text("[nowhere](nowhere.md)\n")
    with pytest.raises(ValueError, match="docs/a.md links to nowhere.md, which is not there"):
        site_pages.build(tmp_path / "build")


def test_the_reference_has_all_that_it_is_of(site: Path) -> None:
    settings = (site / "reference/settings.html").read_text()
    assert all(f"AGENTSTATE_{name.upper()}</code>" in settings for name in Settings.model_fields)
    assert "agentstate tenants quota" in (site / "reference/commands.html").read_text()
    assert "agentstate:restored_pages_total" in (site / "reference/metrics.html").read_text()
    assert "lease-lost" in (site / "reference/errors.html").read_text()
    routes = (site / "reference/http-routes.html").read_text()
    assert "POST /v1/sessions/{session_id}/resume" in routes


def rows(document: str, columns: int, column: str = "") -> list[list[str]]:
    """The rows of the tables of ``document`` whose first heading is ``column``."""
    found, ours = [], False
    for line in (DOCS / document).read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            ours = False
        elif ours and not set(line) <= set("|-: "):
            assert len(cells) == columns, line
            found.append(cells)
        elif cells[0] == column:
            ours = True
    return found


def test_messages_that_are_quoted_are_said() -> None:
    said = "\n".join(_texts())
    quoted = [message for cells in rows("troubleshooting.md", 3, "says") for message in re.findall("`(.*?)`", cells[0])]
    quoted += ["manifests wait for the database"]
    for message in quoted:
        if message in ("agentstate", "GET …/kv", '"account"'):
            continue
        assert all(part.strip() in said for part in message.split("…")), message
    assert len(quoted) > 30


def _texts() -> Iterator[str]:
    """The texts of the code, those with values in them as one, without these."""
    for room in ("agentstate", "api", "engine_patch"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[-.\w]+", "\0", node.value)
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_problems_that_are_named_are_answered() -> None:
    for status, slug in re.findall(r"^\| (\d{3}) `([a-z-]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE):
        assert f"| `{slug}` | {status} |" in reference.errors_page(), slug


def test_metrics_that_are_named_exist() -> None:
    known = reference.metrics()
    named = re.findall(r"`(agentstate[:_][a-z_]+)", "".join(path.read_text() for path in DOCS.glob("*.md")))
    modules = {"agentstate_cpu"}
    for name in set(named) - modules:
        assert f"`{name}`" in known, name


def test_settings_that_are_named_exist() -> None:
    known = {f"AGENTSTATE_{name.upper()}" for name in Settings.model_fields}
    of_clients = {"AGENTSTATE_URL", "AGENTSTATE_API_KEY"}
    for path in {*DOCS.glob("*.md"), ROOT / "README.md"} - {DOCS / "testing.md"}:
        named = set(re.findall(r"\bAGENTSTATE_[A-Z_]+\b", path.read_text()))
        assert named <= known | of_clients, path.name


def test_sizes_of_kv_are_right() -> None:
    found = rows("operations.md", 3, "model")
    assert len(found) == 3
    for model, a_token, of_many in found:
        layers, heads, size = map(int, re.findall(r"\((\d+) layers, (\d+) heads of (\d+)\)", model)[0])
        n_bytes = 2 * layers * heads * size * 2
        assert int(a_token.replace(",", "")) == n_bytes
        number, unit = of_many.split()
        assert float(number) == pytest.approx(n_bytes * 100 * 32_768 / {"GB": 1e9, "TB": 1e12}[unit], rel=0.01)

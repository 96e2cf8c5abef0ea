"""`python .ci/site_pages.py OUT`: build the documentation site, as files that need no server.

The pages are docs/, those that `reference.py` writes from the code, and what of the repository they link to, which the
site shows itself. Zensical makes HTML of them. It ignores hooks and plugins that it does not know, so all that is
written is written before it runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath

import reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
Nav = dict[str, "str | Nav"]
# What part of the site a page belongs to. A page that is not there yet is left out.
NAV: Nav = {
    "AgentState": "index.md",
    "Quick start": "quick-start.md",
    "Concepts": "concepts.md",
    "For agent authors": {
        "The gateway": "gateway.md",
        "Clients and frameworks": "adapters.md",
        "The HTTP API": "http-api.md",
    },
    "For operators": {
        "Operations": "operations.md",
        "Configuration": "configuration.md",
        "The console": "console.md",
        "The command line": "cli.md",
        "The page directory": "pages.md",
        "The shared store": "shared-store.md",
        "Security": "security.md",
        "Troubleshooting": "troubleshooting.md",
    },
    "Reference": {
        "Settings": "reference/settings.md",
        "Commands": "reference/commands.md",
        "HTTP routes": "reference/http-routes.md",
        "Errors": "reference/errors.md",
        "Metrics": "reference/metrics.md",
        "SGLang's flags": "flags.md",
        "The extent format": "extent-format.md",
    },
    "How it is built": {
        "Architecture": "architecture.md",
        "Performance": "performance.md",
        "Benchmarks": "benchmarks.md",
        "Testing": "testing.md",
    },
}
SETTINGS = """[project]
site_name = "AgentState"
site_description = "LLM agents that can be suspended, on SGLang"
docs_dir = "docs"
site_dir = "site"
use_directory_urls = false
extra_css = ["site.css"]
nav = {nav}

[project.theme]
language = "en"
# The pages load nothing from elsewhere.
font = false
features = ["navigation.sections", "navigation.top", "content.code.copy"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle = {{ icon = "lucide/sun", name = "Dark" }}

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle = {{ icon = "lucide/moon", name = "Light" }}
"""
# Names in tables are whole; what is longer than its column breaks between words.
STYLE = ".md-typeset td code { word-break: keep-all; overflow-wrap: normal; }\n"
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
_LANGUAGES = {".py": "python", ".ts": "typescript", ".toml": "toml", ".yaml": "yaml", ".json": "json"}
REPOSITORY = "repository"


def build(out: Path) -> Path:
    """The directory of the site below ``out``, which is made anew. Raises ValueError for a link that leads nowhere."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out / "docs", ignore=shutil.ignore_patterns("*.md"))
    waiting = {path: page_of(path) for path in [*ROOT.glob("README.md"), *DOCS.rglob("*.md")]}
    done: set[Path] = set()
    while waiting:
        path, page = waiting.popitem()
        done.add(path)
        target = out / "docs" / page
        target.parent.mkdir(parents=True, exist_ok=True)
        text, linked = _shown(path, page)
        target.write_text(text)
        waiting |= {each: page_of(each) for each in linked if each not in done}
    for page, write in reference.PAGES.items():
        target = out / "docs" / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(write() + "\n")
    (out / "docs" / "site.css").write_text(STYLE)
    nav = _toml(_present(NAV, out / "docs"))
    (out / "zensical.toml").write_text(SETTINGS.format(nav=nav))
    command = [sys.executable, "-m", "zensical", "build", "--clean"]
    ran = subprocess.run(
        command, cwd=out, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=False
    )
    said = ran.stdout + ran.stderr
    if ran.returncode or "Warning" in said:
        raise ValueError(f"the site cannot be built:\n{said}")
    return out / "site"


def page_of(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    shown = path.relative_to(ROOT).as_posix()
    return f"{REPOSITORY}/{shown}" + ("" if path.suffix == ".md" else ".md")


def _shown(path: Path, page: str) -> tuple[str, set[Path]]:
    """A file as a page, with its links as the site has them, and the files that they lead to."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        links = "\n".join(f"- [`{each.name}`]({relpath(page_of(each), Path(page).parent)})" for each in files)
        return f"# {name}\n\n{links}\n", set(files)
    if path.suffix != ".md":
        return f"# {name}\n\n````` {_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n`````\n", set()
    linked: set[Path] = set()

    def moved(link: re.Match[str]) -> str:
        before, address, rest = link.groups()
        if "://" in address or address.startswith("mailto:"):
            return link[0]
        leads = ROOT / normpath(Path(name).parent / address)
        if not leads.exists():
            raise ValueError(f"{name} links to {address}, which is not there")
        if leads.suffix in (".svg", ".png"):
            return f"{before}{relpath(leads.relative_to(DOCS), Path(page).parent)}{rest}"
        linked.add(leads)
        return f"{before}{relpath(page_of(leads), Path(page).parent)}{rest}"

    lines = [line if within else _LINK.sub(moved, line) for within, line in _lines(path.read_text())]
    return "\n".join(lines) + "\n", linked


def _lines(text: str) -> Iterator[tuple[bool, str]]:
    """The lines of a document, and whether each belongs to a block of code."""
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        yield bool(fence), line
        if found and (not fence or found[1] == fence):
            fence = "" if fence else found[1]


def _present(nav: Nav, docs: Path) -> Nav:
    kept: Nav = {}
    for title, inner in nav.items():
        if isinstance(inner, dict):
            kept[title] = _present(inner, docs)
        elif (docs / inner).exists():
            kept[title] = inner
    return kept


def _toml(nav: Nav) -> str:
    parts = [
        f'{{ "{title}" = {_toml(inner) if isinstance(inner, dict) else f"{chr(34)}{inner}{chr(34)}"} }}'
        for title, inner in nav.items()
    ]
    return f"[{', '.join(parts)}]"


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    built = build(ROOT / "build" / "site")
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(built, destination)
    print(f"{len(list(destination.rglob('*.html')))} pages: {destination / 'index.html'}")

"""`python .ci/environment.py NAME CACHE`: make .venv/NAME of the packages in locks/NAME.txt and this checkout.

The packages lie below CACHE, in an environment named by the lock file, which all checkouts share. uv installs them from
where pip is configured to take packages; where uv cannot be had, pip does. Prints numbered steps with their progress,
and all that an installer has to say when it fails. Needs nothing but Python.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("Python 3.11 or newer is needed")

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
SITE_PACKAGES = Path("lib", f"python{VERSION}", "site-packages")
SIZES = {"engine": " (SGLang, 11 GB)"}
# Imported once at the end, so that later starts find them compiled. To compile all packages would take far longer.
FIRST_IMPORTS = {
    "service": "agentstate.cli.main, agentstate.api.app, openai, pytest",
    "adapters": "agentstate.cli.main, agentstate.api.app, agents, langgraph.graph, pytest",
    "adk": "agentstate.cli.main, agentstate.api.app, google.adk.runners, pytest",
    "engine": "sglang.launch_server, sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler",
}
FIRST_LINE_S, NEXT_LINE_S = 2, 30


def main(name: str, cache: Path) -> None:
    base = environment_of(name, cache)
    base.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{base}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout may be setting up the same packages
        fresh = not (base / "complete").exists()
        steps = Steps(name, 4 if fresh else 2)
        installer = Installer(cache, steps)
        if fresh:
            install_packages(name, cache, base, installer, steps)
        own = Path(".venv", name)
        shutil.rmtree(own, ignore_errors=True)
        venv.create(own, symlinks=True)
        (own / SITE_PACKAGES / "packages.pth").write_text(
            f"import site; site.addsitedir({str(base / SITE_PACKAGES)!r})\n"
        )
        steps.run("this checkout", installer.command(own, "--no-build-isolation", "--editable", "."))
        if fresh:
            compiling = {
                variable: value for variable, value in os.environ.items() if variable != "PYTHONDONTWRITEBYTECODE"
            }
            first = FIRST_IMPORTS.get(name, "site")
            steps.run("first import", [str(own / "bin/python"), "-c", f"import {first}"], environment=compiling)
        (own / "complete").touch()


def environment_of(name: str, cache: Path) -> Path:
    key = hashlib.sha256(Path("locks", f"{name}.txt").read_bytes()).hexdigest()[:12]
    return cache / "environments" / f"{name}-py{VERSION}-{key}"


def install_packages(name: str, cache: Path, base: Path, installer: Installer, steps: Steps) -> None:
    lock = Path("locks", f"{name}.txt")
    packages = sum("==" in line for line in lock.read_text().splitlines()) + 1
    shutil.rmtree(base, ignore_errors=True)
    venv.create(base, symlinks=True)
    if name == "lmcache":
        # All but a few of its packages are the engine's: those files are linked, not installed once more.
        engine = environment_of("engine", cache) / SITE_PACKAGES
        subprocess.run(["cp", "-al", f"{engine}/.", str(base / SITE_PACKAGES)], check=True)
    downloads = cache / "downloads" / name
    # pip is what the demo's model is downloaded with.
    command = installer.command(base, "--requirement", str(lock), "pip", downloads=downloads)
    steps.run(
        f"{packages} packages{SIZES.get(name, '')}",
        command,
        progress=lambda output: f"{installer.prepared(output, downloads)} of {packages} prepared",
        environment=installer.environment,
    )
    shutil.rmtree(downloads, ignore_errors=True)  # the environment has links to the same files; pip leaves nothing here
    (base / "complete").touch()


class Installer:
    """uv, or pip where uv cannot be installed. uv has an environment of its own below the cache."""

    def __init__(self, cache: Path, steps: Steps):
        home = cache / "environments" / f"installer-py{VERSION}"
        python = str(home / "bin" / "python")
        own_pip = find_spec("pip") is not None
        self._pip = [sys.executable if own_pip else python, "-m", "pip", "--disable-pip-version-check"]
        self._uv = home / "bin" / "uv"
        with Path(f"{home}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (home / "complete").exists():
                steps.skip()
            else:
                shutil.rmtree(home, ignore_errors=True)
                venv.create(home, symlinks=True, with_pip=not own_pip)
                if not steps.run("uv", [*self._pip, "--python", python, "install", "uv>=0.8"], may_fail=True):
                    print("uv cannot be installed: pip takes its place")
                (home / "complete").touch()
        self._settings = self._pip_settings()
        self.environment = self._environment()

    def command(self, target: Path, *what: str, downloads: Path | None = None) -> list[str]:
        """The command line that installs into the environment ``target``, without dependencies."""
        python = str(target / "bin" / "python")
        if not self._uv.exists():
            return [*self._pip, "--python", python, "install", "--no-deps", *what]
        given = ["--no-cache"] if downloads is None else ["--cache-dir", str(downloads)]
        # Like pip, which takes a version from whichever index has it.
        given += ["--index-strategy", "unsafe-best-match"]
        for option in ("index-url", "extra-index-url", "find-links"):
            for value in self._settings.get(option, "").split():
                given += [f"--{option}", value]
        for host in self._settings.get("trusted-host", "").split():
            given += ["--allow-insecure-host", host]
        if self._settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            given += ["--no-index"]
        return [str(self._uv), "pip", "install", "--python", python, "--no-deps", *given, *what]

    def prepared(self, output: str, downloads: Path) -> int:
        """How many packages it has unpacked by now, or, with pip, has begun with."""
        if not self._uv.exists():
            return sum(line.startswith("Collecting ") for line in output.splitlines())
        unpacked = downloads / "archive-v0"
        return len(list(unpacked.iterdir())) if unpacked.exists() else 0

    def _environment(self) -> Mapping[str, str]:
        own = {"UV_HTTP_TIMEOUT": self._settings.get("timeout", "120")}
        if "cert" in self._settings:
            own["SSL_CERT_FILE"] = self._settings["cert"]
        if "proxy" in self._settings:
            own["ALL_PROXY"] = self._settings["proxy"]
        return {**own, **os.environ}

    def _pip_settings(self) -> dict[str, str]:
        """What pip is told by its files and by the environment, which counts most, as `pip config list` says it."""
        lines = subprocess.run(
            [*self._pip, "config", "list"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
        for line in lines:
            name, _, value = line.partition("=")
            section, _, option = name.partition(".")
            if section in found:
                found[section][option] = str(ast.literal_eval(value))
        return {**found["global"], **found["install"], **found[":env:"]}


class Steps:
    """Prints what is done, with its number, and how far it is when that takes a while."""

    def __init__(self, name: str, count: int):
        self._name = name
        self._count = count
        self._done = 0

    def skip(self) -> None:
        self._done += 1

    def run(
        self,
        what: str,
        command: Sequence[str],
        *,
        progress: Callable[[str], str] = lambda output: "",
        environment: Mapping[str, str] | None = None,
        may_fail: bool = False,
    ) -> bool:
        """Run a command: whether it succeeded. Unless it ``may_fail``, this program ends then with all that it said."""
        self._done += 1
        title = f"{self._name} {self._done}/{self._count}: {what}"
        started, shown = time.monotonic(), 0.0
        with tempfile.NamedTemporaryFile() as output:
            said = Path(output.name)
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    took = time.monotonic() - started
                    if took >= FIRST_LINE_S and (sys.stdout.isatty() or not shown or took - shown >= NEXT_LINE_S):
                        shown = took
                        self._show(title, progress(said.read_text(errors="replace")), took)
            finally:
                process.kill()
                process.wait()
            self._show(title, "failed" if process.returncode else "done", time.monotonic() - started, last=True)
            if process.returncode and not may_fail:
                sys.exit(said.read_text(errors="replace"))
        return process.returncode == 0

    def _show(self, title: str, state: str, took_s: float, last: bool = False) -> None:
        line = f"{title}: {state}, {took_s:.0f} s" if state else f"{title}, {took_s:.0f} s"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

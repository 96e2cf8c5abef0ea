"""`python .ci/canary.py [VERSION ...]`: does AgentState go with these versions of SGLang, or with the newest one?

Run by hand, after `make setup`. Takes the wheel alone of each version from where pip is configured to take packages,
unpacks it below the cache, and makes .venv/sglang-VERSION: the engine's environment with that SGLang before its own.
What a wheel requires beside it is not installed, so that an import may fail here that would not elsewhere.

For each version it prints what an engine would miss, and runs the tests of SGLang's contract and of the layout of KV.
With `--restore` it also runs the tests that start engines of two versions: each restores what the other has stored.
Exits with 1 unless all of that succeeds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
ENGINE = ROOT / ".venv" / "engine"
TESTS = ("tests/engine/test_sglang_api.py", "tests/engine/test_layout.py", "tests/engine/test_identity.py")
RESTORE = "tests/acceptance/test_sglang_versions.py"


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("versions", nargs="*", help="such as 0.5.22; the newest one if none is given")
    options.add_argument("--restore", action="store_true", help="also start engines")
    options.add_argument("--wheels", type=Path, help="take wheels from this directory")
    given = options.parse_args()
    cache = Path(os.environ.get("AGENTSTATE_CACHE_DIR") or Path.home() / ".cache" / "agentstate")
    failed = []
    for version in given.versions or [None]:
        wheel = fetch(version, cache / "wheels", given.wheels)
        name = wheel.name.split("-")[1]
        python = environment(wheel, name, cache)
        print(f"== SGLang {name}: {python}", flush=True)
        if not (complete(python) and tests(python) and (not given.restore or restore(python, cache))):
            failed.append(name)
    print(f"These do not go with AgentState: {', '.join(failed)}" if failed else "All of them go with AgentState")
    return 1 if failed else 0


def fetch(version: str | None, directory: Path, given: Path | None) -> Path:
    """The wheel of a version, or of the newest one, in ``given`` or else downloaded to ``directory``."""
    target = directory / (version or "newest")
    if given is None:
        if version is None:
            shutil.rmtree(target, ignore_errors=True)
        if not list(target.glob("*.whl")):
            what = "sglang" if version is None else f"sglang=={version}"
            pip = [str(ENGINE / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(target), what], check=True)
    (wheel,) = (given or target).glob(f"sglang-{version or '*'}-*.whl")
    return wheel


def environment(wheel: Path, version: str, cache: Path) -> Path:
    """The interpreter of an environment that is the engine's but for SGLang."""
    packages = cache / "environments" / f"sglang-{version}"
    if not packages.exists():
        partial = packages.with_name(f"{packages.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(packages)
    own = ROOT / ".venv" / f"sglang-{version}"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(ENGINE, own, symlinks=True)
    (own / SITE_PACKAGES / "sglang.pth").write_text(f"import sys; sys.path.insert(0, {str(packages)!r})\n")
    return own / "bin" / "python"


def complete(python: Path) -> bool:
    """Whether it has all that an engine looks for when it starts. Prints what it lacks."""
    return run(python, "-W", "ignore", "-m", "engine_patch.contract")


def tests(python: Path) -> bool:
    return run(python, "-m", "pytest", "-n", "0", "--quiet", "--disable-warnings", *TESTS)


def restore(python: Path, cache: Path) -> bool:
    adapters = ROOT / ".venv" / "adapters" / "bin" / "python"
    given = {
        "AGENTSTATE_ENGINE_PYTHON": str(ENGINE / "bin" / "python"),
        "AGENTSTATE_OTHER_ENGINE_PYTHON": str(python),
        "AGENTSTATE_CACHE_DIR": str(cache),
        "OMP_WAIT_POLICY": "passive",
    }
    return run(adapters, "-m", "pytest", "-n", "0", RESTORE, **given)


def run(python: Path, *arguments: str, **environment: str) -> bool:
    given = {**os.environ, **environment}
    # SGLang is compiled once: that takes longer than to run it.
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run([python, *arguments], cwd=ROOT, env=given).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

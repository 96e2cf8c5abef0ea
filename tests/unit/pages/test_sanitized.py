"""The native extension's tests with builds that end the process at the first error of memory or arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from compiler import c_compiler
from tools import missing

import agentstate.pages.native

HERE = Path(__file__).parent
SOURCE = Path(agentstate.pages.native.__file__).with_name("native.c")
TESTS = [HERE / "test_native.py", HERE / "test_codec.py"]


@pytest.fixture(scope="module")
def runtime() -> str:
    """AddressSanitizer's library, which must come before all others."""
    compiler = c_compiler()
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        missing(f"{compiler} has no AddressSanitizer")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing("no Python.h")
    return found


@pytest.mark.parametrize("simd", [0, 256, 512])
def test_no_memory_is_misused(simd: int, runtime: str, tmp_path: Path) -> None:
    """With each of the ways to compute checksums and to decode, as far as the processor has them; everything else does
    not depend on which it is."""
    library = tmp_path / "_native.abi3.so"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    include = sysconfig.get_paths()["include"]
    command = [c_compiler(), *sanitize, f"-DAGENTSTATE_SIMD={simd}", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-missing-field-initializers", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    # Those that start processes of their own would start them with the other build.
    chosen = "not turned_off and not interpreter" if simd == 512 else "checksum or codec"
    run = subprocess.run(
        [sys.executable, HERE / "sanitized.py", library, *TESTS, "-n", "0", "-k", chosen],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "ERROR: AddressSanitizer" not in run.stderr

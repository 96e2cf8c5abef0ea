"""The native extension's tests with builds that end the process at the first error of memory or arithmetic."""

from __future__ import annotations

import os
import shutil
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


# Those that start processes of their own would start them with the other build.
ALONE = "not turned_off and not interpreter"


def runtime(name: str) -> str:
    """A sanitizer's library, which must come before all others."""
    compiler = c_compiler()
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        missing(f"{compiler} has no {name}")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing("no Python.h")
    return found


def built(directory: Path, *options: str) -> Path:
    library = directory / "_native.abi3.so"
    command = [c_compiler(), *options, "-fno-omit-frame-pointer", "-g", "-O1"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-shared", "-fPIC"]
    command += [f"-I{sysconfig.get_paths()['include']}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def run_with(library: Path, chosen: str, launcher: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, sys.executable, HERE / "sanitized.py", library, *TESTS, "-n", "0", "-k", chosen],
        env={**os.environ, "PYTHONMALLOC": "malloc", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("simd", [0, 256, 512])
def test_no_memory_is_misused(simd: int, tmp_path: Path) -> None:
    """With each of the ways to compute checksums and to decode, as far as the processor has them; everything else does
    not depend on which it is."""
    preloaded = runtime("libasan.so")
    library = built(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-DAGENTSTATE_SIMD={simd}")
    chosen = ALONE if simd == 512 else "checksum or codec"
    run = run_with(library, chosen, [], LD_PRELOAD=preloaded, ASAN_OPTIONS="detect_leaks=0")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "ERROR: AddressSanitizer" not in run.stderr


def test_threads_do_not_meet_in_memory(tmp_path: Path) -> None:
    preloaded = runtime("libtsan.so")
    library = built(tmp_path, "-fsanitize=thread")
    # Where addresses are more random than it expects, it ends before it begins.
    fixed = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    options = {"LD_PRELOAD": preloaded, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0"}
    if "unexpected memory mapping" in (run := run_with(library, "threads", fixed, **options)).stderr:
        missing("ThreadSanitizer does not go with this kernel")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "WARNING: ThreadSanitizer" not in run.stderr

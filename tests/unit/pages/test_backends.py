from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from compiler import c_compiler
from contents import MARK, MHA, WIDE, expected, key, keys, read, write
from tools import missing

from agentstate.pages import Chunk, Geometry, KvikioBackend, LayerwiseReader, PageStore, PosixBackend, ReadBackend
from agentstate.pages.testing.backends import ReadBackendTests

# What KvikIO 26.10 looks up in the driver when it reads. It takes a pointer for the host's where none of this works.
# The version must be an answer, or KvikIO waits for itself for ever; from 12.8 on it wants more functions.
FUNCTIONS = """
cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxGetDevice cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuDeviceGet
cuDeviceGetAttribute cuDeviceGetCount cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuEventCreate
cuEventDestroy_v2 cuEventQuery cuEventRecord cuEventSynchronize cuGetErrorName cuGetErrorString cuLaunchHostFunc
cuMemFreeHost cuMemGetAddressRange_v2 cuMemHostAlloc cuMemHostRegister_v2 cuMemHostUnregister cuMemcpyAsync
cuMemcpyDtoHAsync_v2 cuMemcpyHtoDAsync_v2 cuPointerGetAttribute cuPointerGetAttributes cuStreamCreate
cuStreamDestroy_v2 cuStreamSynchronize
"""


def build_driver(directory: Path, initialised: int) -> Path:
    """A libcuda.so.1 that finds nothing; ``initialised`` is what its cuInit returns."""
    source, library = directory / "driver.c", directory / "libcuda.so.1"
    source.write_text(
        "\n".join(f"int {name}(void) {{ return 3; }}" for name in FUNCTIONS.split())
        + f"\nint cuInit(unsigned flags) {{ return {initialised}; }}"
        + "\nint cuDriverGetVersion(int *version) { *version = 12000; return 0; }\n"
    )
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([c_compiler(), *flags, "-o", str(library), str(source)], check=True)
    return library


def has_driver() -> bool:
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False


@pytest.fixture(scope="session")
def kvikio(tmp_path_factory: pytest.TempPathFactory) -> KvikioBackend:
    """KvikIO on host memory, through the driver of this machine or one that is built for the purpose."""
    if find_spec("kvikio") is None:
        missing("no KvikIO: pip install 'agentstate[kvikio]'")
    if not has_driver():
        # Whoever looks for a library of this name finds the one that is loaded already.
        ctypes.CDLL(str(build_driver(tmp_path_factory.mktemp("driver"), 0)), mode=ctypes.RTLD_GLOBAL)
    load_cufile()
    return KvikioBackend(aligned, list)


def load_cufile() -> None:
    """KvikIO looks for it beside the interpreter, and here packages may lie elsewhere: see `.ci/environment.py`."""
    for folder in sys.path:
        for library in Path(folder).glob("nvidia/cu*/lib/libcufile.so.0"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


def aligned(n_bytes: int) -> np.ndarray:
    whole = np.empty(n_bytes + 4096, dtype=np.uint8)
    skew = -whole.ctypes.data % 4096
    return whole[skew : skew + n_bytes]


class TestPosix(ReadBackendTests):
    @pytest.fixture
    def backend(self) -> ReadBackend:
        return PosixBackend()


class TestKvikio(ReadBackendTests):
    @pytest.fixture
    def backend(self, kvikio: KvikioBackend) -> ReadBackend:
        return kvikio


@pytest.fixture(params=["posix", "kvikio"])
def backend(request: pytest.FixtureRequest) -> ReadBackend:
    return PosixBackend() if request.param == "posix" else request.getfixturevalue("kvikio")


@pytest.fixture(params=[MHA, WIDE], ids=["MHA", "WIDE"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path, MARK, request.param)
    for extent in ([5, 0, 1], [2], [3, 4]):
        write(store, keys(*extent))
    yield store
    store.close()


def reader_of(geometry: Geometry, backend: ReadBackend, chunk_bytes: int = 1 << 20) -> LayerwiseReader:
    return LayerwiseReader(geometry, staging_bytes=4 * chunk_bytes, threads=2, chunk_bytes=chunk_bytes, backend=backend)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_pages_come_back(store: PageStore, backend: ReadBackend, chunk_bytes: int) -> None:
    reader = reader_of(store.geometry, backend, chunk_bytes)
    requests = [store.pin(keys(*range(6))), store.pin(keys(4, 1))]
    assert read(reader, requests) == expected(store.geometry, requests)
    reader.close()


def test_damage_costs_its_own_pages(store: PageStore, backend: ReadBackend) -> None:
    flipped, cut = store.pin(keys(2)).segments[0].extent, store.pin(keys(3)).segments[0].extent
    with flipped.path.open("r+b") as file:
        file.seek(flipped.layout.component_range(1, 0, 0, 1)[0])
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.truncate(cut.path, cut.layout.data_offset + cut.layout.slab_bytes)
    request = store.pin(keys(*range(6)))
    reader = reader_of(store.geometry, backend)
    found = read(reader, [request])
    reader.close()
    lost = {(layer, page) for (_, layer, page), data in found.items() if data is None}
    later = range(1, store.geometry.layers)
    assert lost == {(1, 2)} | {(layer, page) for layer in later for page in (3, 4)}
    right = expected(store.geometry, [request])
    assert all(right[place] == data for place, data in found.items() if data is not None)


def test_a_header_that_is_damaged_is_not_read_on(store: PageStore, backend: ReadBackend) -> None:
    extent = store.pin(keys(2)).segments[0].extent
    with extent.path.open("r+b") as file:
        file.write(b"not an extent")
    reader = reader_of(store.geometry, backend)
    found = read(reader, [store.pin(keys(2))])
    reader.close()
    assert set(found.values()) == {None}


def test_a_buffer_is_not_overwritten_before_its_consumer_allows_it(store: PageStore, backend: ReadBackend) -> None:
    """Two buffers for many chunks: what one holds is looked at only when it is about to be read into again."""
    reader = LayerwiseReader(store.geometry, staging_bytes=1, threads=2, chunk_bytes=1, backend=backend)
    right = expected(store.geometry, [store.pin(keys(*range(6)))])
    looked: list[bool] = []

    def looking(chunk: Chunk) -> Callable[[], None]:
        def look() -> None:
            for segment, arrays in chunk.parts:
                for i in range(segment.pages):
                    found = [array[i].tobytes() for array in arrays]
                    looked.append(found == right[0, chunk.layer, segment.first + i])

        return look

    with reader.open(store.pin(keys(*range(6)))) as stream:
        for chunk in stream:
            chunk.keep_until = looking(chunk)
    # The next stream takes the last two.
    assert read(reader, [store.pin(keys(*range(6)))]) == right
    assert looked == [True] * len(right)
    reader.close()


def test_a_file_that_kvikio_cannot_open_is_an_error_of_the_file(kvikio: KvikioBackend, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="KvikIO cannot open .*gone"):
        kvikio.open(-1, tmp_path / "gone")


def test_kvikio_writes_no_log_where_the_engine_was_started(kvikio: KvikioBackend) -> None:
    assert not Path("cufile.log").exists()
    assert Path(os.environ["CUFILE_LOGFILE_PATH"]).parent != Path.cwd()


TRY = "from agentstate.pages import KvikioBackend\nKvikioBackend(bytearray, list)"


def attempt(program: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return run.stderr.strip().rpartition("\n")[2]


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_without_a_driver_kvikio_is_refused() -> None:
    last = attempt(TRY)
    assert last.startswith("agentstate.errors.SettingsError: KvikIO needs a CUDA driver, and there is none")
    assert "AGENTSTATE_READ_BACKEND=posix" in last


def test_with_a_driver_that_does_not_work_kvikio_is_refused(tmp_path: Path) -> None:
    build_driver(tmp_path, 100)
    last = attempt(TRY, LD_LIBRARY_PATH=str(tmp_path))
    assert last.startswith("agentstate.errors.SettingsError: KvikIO needs a CUDA driver, and the one here fails with")
    assert "100" in last


def test_without_kvikio_its_package_is_named(tmp_path: Path) -> None:
    build_driver(tmp_path, 0)
    last = attempt(f"import sys\nsys.modules['kvikio'] = None\n{TRY}", LD_LIBRARY_PATH=str(tmp_path))
    assert last.startswith("agentstate.errors.SettingsError: AGENTSTATE_READ_BACKEND=kvikio needs KvikIO")
    assert "agentstate[kvikio]" in last


def test_kvikio_is_told_to_leave_the_driver_of_cufile_alone_where_it_would_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to read around the page cache, with threads enough."""
    if find_spec("kvikio") is None:
        missing("no KvikIO: pip install 'agentstate[kvikio]'")
    build_driver(tmp_path, 0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    told = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_backends import load_cufile\nload_cufile()\n{TRY}\nimport kvikio.defaults as d, pathlib\n"
        "assert d.get('auto_direct_io_read') and d.get('num_threads') == 8 and d.get('task_size') == 1 << 20\n"
        "assert d.get('compat_mode').name == 'ON' or pathlib.Path('/proc/modules').exists()"
    )
    assert attempt(told, LD_LIBRARY_PATH=str(tmp_path)) == ""


def test_a_page_of_another_layer_is_found_with_every_backend(store: PageStore, backend: ReadBackend) -> None:
    """A device that answers with an intact block from elsewhere."""
    extent = store.pin(keys(2)).segments[0].extent
    raw = extent.path.read_bytes()
    first, second = (extent.layout.component_range(layer, 0, 0, 1) for layer in (0, 1))
    with extent.path.open("r+b") as file:
        file.seek(second[0])
        file.write(raw[first[0] : sum(first)])
    reader = reader_of(store.geometry, backend)
    found = read(reader, [store.pin(keys(2))])
    reader.close()
    assert [layer for (_, layer, _), data in found.items() if data is None] == [1]
    assert key(2) in store

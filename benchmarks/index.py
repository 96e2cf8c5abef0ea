"""The index of a page store with many pages: how long it takes to open, its memory, and what a look-up costs.

    python -m agentstate.benchmarks.index [--pages 1000000] [--pages-per-extent 16] [--directory DIR] [--json PATH]

The extents are sparse files with headers that nobody reads, because the index knows them already. Opening, looking up
and counting memory happen in a process of their own, which has nothing else in memory. CPU seconds stand beside those
of the clock: the two differ if other processes want the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agentstate.pages import Geometry, PageStore
from agentstate.pages.extent import ExtentLayout
from agentstate.pages.index import ExtentRecord, PageIndex
from agentstate.pages.keys import PageKeys

# Qwen2.5-7B: 28 layers, 4 KV heads of 128, bf16, 64 tokens a page.
GEOMETRY = Geometry(layers=28, page_size=64, component_bytes=(65536, 65536))
MARK = bytes(range(32))
CHAIN = 1024


def key(number: int) -> bytes:
    """As uniform as a hash, and known from its number."""
    return (number * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "big") + number.to_bytes(24, "big")


def fill(directory: Path, pages: int, per_extent: int) -> None:
    (directory / "extents").mkdir(parents=True)
    file_bytes = ExtentLayout(GEOMETRY, per_extent).file_bytes
    index = PageIndex(directory / "index", MARK, GEOMETRY)
    for start in range(0, pages, 1000 * per_extent):
        with index.change() as change:
            for first in range(start, min(pages, start + 1000 * per_extent), per_extent):
                number = first // per_extent + 1
                path = directory / "extents" / f"{number:016x}.ext"
                path.touch()
                os.truncate(path, file_bytes)
                status = path.stat()
                change.record(number, ExtentRecord(per_extent, per_extent, file_bytes, status.st_mtime_ns, number))
                keys = [key(first + slot) for slot in range(per_extent)]
                change.put(number, {name: slot for slot, name in enumerate(keys)})
                change.list_keys(number, PageKeys.of(keys))
    index.close()


def resident_bytes() -> int:
    """Everything that this process has in memory, the mapped index too."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def measure(directory: Path, pages: int) -> dict[str, float]:
    before = resident_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    store = PageStore(directory, MARK, GEOMETRY)
    open_s, open_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    assert store.stats.pages == pages
    chains = [[key(number) for number in range(at, at + CHAIN)] for at in range(0, pages - CHAIN, pages // 200)]
    costs, start_cpu = [], time.process_time()
    for _ in range(3):
        for chain in chains:
            start = time.perf_counter()
            found = store.prefix_length(chain)
            costs.append((time.perf_counter() - start) / CHAIN * 1e6)
            assert found == CHAIN
    look_up_cpu_s = time.process_time() - start_cpu
    resident = resident_bytes() - before
    store.close()
    costs.sort()
    return {
        "pages": pages,
        "open_s": open_s,
        "open_cpu_s": open_cpu_s,
        "resident_bytes_a_page": resident / pages,
        "look_up_us_a_key_median": costs[len(costs) // 2],
        "look_up_cpu_us_a_key_mean": look_up_cpu_s / len(costs) / CHAIN * 1e6,
        "look_up_us_a_key_p90": costs[len(costs) * 9 // 10],
        "index_bytes_a_page": (directory / "index" / "data.mdb").stat().st_size / pages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--pages-per-extent", type=int, default=16)
    parser.add_argument("--directory", type=Path, help="where to make the store; a temporary directory if left out")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.pages)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        store = Path(directory) / "rank0"
        pages = arguments.pages // arguments.pages_per_extent * arguments.pages_per_extent
        fill(store, pages, arguments.pages_per_extent)
        child = [sys.executable, "-m", "agentstate.benchmarks.index", "--pages", str(pages), "--measure", str(store)]
        result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    for name, value in result.items():
        print(f"{name:26} {value:14,.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Restore bandwidth into device memory: `python -m agentstate.benchmarks.gpu_restore DIRECTORY [--json PATH]`.

For each case, pages of random bits are spilled from the GPU to DIRECTORY, restored to the GPU with each backend, and
compared with the machine's limits: direct reads of the same files, and copies from pinned host memory. Needs torch
with CUDA and no SGLang. A case that does not fit the GPU and the disk is cut down to what does, and its row says so.
Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentstate.benchmarks import results
from agentstate.benchmarks.device import read_limit
from agentstate.errors import SettingsError
from agentstate.pages import LayerwiseReader, PageStore, fingerprint
from engine_patch.restore import Restorer
from engine_patch.spill import Spiller
from engine_patch.staging import PinnedMemory, read_backend
from engine_patch.transfer import DevicePages

PAGE_SIZE = 64
MARK = fingerprint(benchmark="gpu_restore")


@dataclass(frozen=True)
class Case:
    """A KV geometry as its model's configuration has it, on one GPU, and a context length."""

    model: str
    tokens: int
    layers: int
    component_bytes: tuple[int, ...]  # a token

    @property
    def bytes_a_token(self) -> int:
        return self.layers * sum(self.component_bytes)


CASES = [
    Case("Llama-3.1-70B", 131_072, 80, (2048, 2048)),
    Case("Qwen2.5-7B", 131_072, 28, (1024, 1024)),
    Case("Qwen2.5-7B", 410_000, 28, (1024, 1024)),
    Case("Qwen2.5-7B-1M", 1_010_000, 28, (1024, 1024)),
    Case("DeepSeek-V3", 131_072, 61, (1152,)),
]


def measure(
    case: Case, directory: Path, device: torch.device, threads: int, staging_bytes: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row a backend."""
    pages = min(case.tokens, _fitting_tokens(case, directory, device, 2 * staging_bytes)) // PAGE_SIZE
    if pages == 0:
        raise SettingsError(f"not one page of {case.model} fits the GPU and {directory}")
    shape = (pages * PAGE_SIZE,)
    tensors = [tuple(_random((*shape, size), device) for size in case.component_bytes) for _ in range(case.layers)]
    on_device = DevicePages(tensors, PAGE_SIZE)
    keys = [number.to_bytes(32, "big") for number in range(pages)]
    numbers = torch.arange(pages)
    n_bytes = pages * on_device.geometry.page_bytes
    with tempfile.TemporaryDirectory(dir=directory) as place:
        store = PageStore(Path(place), MARK, on_device.geometry)
        spill_s = _spill(store, on_device, keys, numbers, staging_bytes)
        sums = _sums(tensors)
        limits = {
            "read_limit_gb_s": read_limit(sorted(Path(place).rglob("*.ext")), threads) / 1e9,
            "pinned_h2d_limit_gb_s": _pinned_limit(device) / 1e9,
        }
        for backend in ("posix", "kvikio"):
            if backend == "kvikio" and find_spec("kvikio") is None:
                continue
            reader = LayerwiseReader(
                on_device.geometry,
                staging_bytes=staging_bytes,
                threads=threads,
                backend=read_backend(backend, device),
            )
            restorer = Restorer(store, on_device, reader)
            seconds = [_restore(restorer, tensors, keys, numbers, sums) for _ in range(repeats)]
            restorer.close()
            median_s = statistics.median(seconds)
            yield {
                **asdict(case),
                "backend": backend,
                "tokens": pages * PAGE_SIZE,
                "asked_tokens": case.tokens,
                "bytes": n_bytes,
                "restore_s": seconds,
                "restore_gb_s": n_bytes / median_s / 1e9,
                "spill_gb_s": n_bytes / spill_s / 1e9,
                **limits,
                "share_of_limit": n_bytes / median_s / 1e9 / min(limits.values()),
            }
        store.close()


def _fitting_tokens(case: Case, directory: Path, device: torch.device, reserved_bytes: int) -> int:
    disk = os.statvfs(directory)
    # A twentieth of the disk stays free, and some of the GPU for what torch needs.
    room = min(
        torch.cuda.mem_get_info(device)[0] - reserved_bytes - (1 << 30), disk.f_bavail * disk.f_frsize * 19 // 20
    )
    return max(0, room) // case.bytes_a_token


def _random(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)


def _spill(store: PageStore, pages: DevicePages, keys: list[bytes], numbers: torch.Tensor, staging_bytes: int) -> float:
    torch.cuda.synchronize(pages.device)
    spiller = Spiller(store, pages, staging_bytes)
    started_s = time.perf_counter()
    spiller.offer(keys, numbers)
    spiller.drain()
    seconds = time.perf_counter() - started_s
    stored = list(spiller.results)
    spiller.close()
    if stored != [True]:
        raise SettingsError("the pages could not be stored: see the log")
    return seconds


def _restore(
    restorer: Restorer,
    tensors: list[tuple[torch.Tensor, ...]],
    keys: list[bytes],
    numbers: torch.Tensor,
    sums: list[int],
) -> float:
    for tensor in (tensor for layer in tensors for tensor in layer):
        tensor.zero_()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    restorer.queue("r", keys, numbers)
    failed = restorer.finish(restorer.start()).failed
    seconds = time.perf_counter() - started_s
    if failed or _sums(tensors) != sums:
        raise RuntimeError("what was restored is not what was spilled")
    return seconds


def _sums(tensors: list[tuple[torch.Tensor, ...]]) -> list[int]:
    return [int(tensor.sum(dtype=torch.int64)) for layer in tensors for tensor in layer]


def _pinned_limit(device: torch.device, n_bytes: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes a second from pinned host memory to the device, in copies of 4 MiB."""
    host = np.zeros(n_bytes, dtype=np.uint8)
    pinned = PinnedMemory(host, device)
    source, target = torch.from_numpy(host), torch.empty(n_bytes, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        for mine, theirs in zip(target.split(4 << 20), source.split(4 << 20), strict=True):
            mine.copy_(theirs, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(n_bytes / (time.perf_counter() - started_s))
    pinned.close()
    return statistics.median(rates)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m agentstate.benchmarks.gpu_restore", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, help="an existing directory on the drive to measure")
    parser.add_argument("--threads", type=int, default=4, help="threads that read (default: 4)")
    parser.add_argument("--staging-mib", type=int, default=512, help="memory to stage in (default: 512)")
    parser.add_argument("--repeats", type=int, default=3, help="restores a backend (default: 3)")
    parser.add_argument("--json", type=Path, help="where to write the raw rows")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device is found here: this benchmark measures one\n")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for case in CASES:
        for row in measure(case, given.directory, device, given.threads, given.staging_mib << 20, given.repeats):
            rows.append(row)
            cut = "" if row["tokens"] >= row["asked_tokens"] - PAGE_SIZE else f" (of {row['asked_tokens']:,})"
            print(
                f"{case.model}, {row['tokens']:,} tokens{cut}, {row['backend']}: {row['restore_gb_s']:.2f} GB/s, "
                f"{row['share_of_limit']:.0%} of the limit (drive {row['read_limit_gb_s']:.2f}, "
                f"bus {row['pinned_h2d_limit_gb_s']:.2f}); spilled at {row['spill_gb_s']:.2f}"
            )
        torch.cuda.empty_cache()
    if given.json is not None:
        settings = {"gpu": torch.cuda.get_device_name(device), **vars(given), "directory": "", "json": ""}
        results.write(given.json, results.record("gpu_restore", settings, rows))


if __name__ == "__main__":
    main()

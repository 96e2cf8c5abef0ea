"""`agentstate pages bench`: this store against the disk that it lies on, and against what a user might take instead.

One run alternates between all of them, round by round, and reports medians: figures of different runs cannot be
compared. Reads are cold. The store and the device use direct I/O; the others are buffered, and their files are
dropped from the page cache before (``posix_fadvise``). Everything is used with the same number of threads.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.contenders import AgentStateStore, Contender, Device, DeviceMemory, alternatives
from agentstate.benchmarks.terminal import console
from agentstate.pages import READ_THREADS, Geometry, LayerwiseReader, Quota
from agentstate.settings import Settings

PAGE_SIZE = 64
GEOMETRIES = {
    # Layers; then a component's bytes: tokens a page, KV heads, head size, bytes a number.
    "qwen2.5-7b": Geometry(28, PAGE_SIZE, (PAGE_SIZE * 4 * 128 * 2,) * 2),
    "smollm2": Geometry(30, PAGE_SIZE, (PAGE_SIZE * 3 * 64 * 2,) * 2),
    "smollm2-fp32": Geometry(30, PAGE_SIZE, (PAGE_SIZE * 3 * 64 * 4,) * 2),
}
CASES = ("idle", "staged", "busy", "recycled", "turns", "merged")
TURNS, PAGES_A_TURN = 100, 13
# What an engine on a CPU reads at a time.
CHUNK_BYTES = 8 << 20
# The device's memory: far more than any cache of the processor, and no burden for a small machine.
DEVICE_BYTES = 512 << 20
# Both processors of a small machine, as a forward takes them.
BUSY_PROCESSES = 2
BUSY = "import numpy as np\na = np.ones((512, 512), np.float32)\nwhile True: a @ a"


@dataclass(frozen=True)
class Case:
    """What is measured: ``pages`` of a geometry, and under which circumstances."""

    name: str
    geometry: str
    pages: int


@dataclass
class Sample:
    seconds: float
    cpu_s: float


def _threads(settings: Settings) -> int:
    return settings.read_threads or READ_THREADS


def suite(names: Sequence[str], geometries: Sequence[str], tokens: Sequence[int]) -> list[Case]:
    """The cases to measure: the first geometry with every length, everything else with the length nearest to 16k
    tokens; and turns of an agent with the smallest pages."""
    typical = min(tokens, key=lambda n: abs(n - 16384)) // PAGE_SIZE
    cases = [Case("idle", geometries[0], n // PAGE_SIZE) for n in tokens]
    cases += [Case("idle", geometry, typical) for geometry in geometries[1:]]
    cases += [Case(name, geometries[0], typical) for name in ("staged", "busy", "recycled")]
    small = min(geometries, key=lambda name: GEOMETRIES[name].page_bytes)
    cases += [Case(name, small, TURNS * PAGES_A_TURN) for name in ("turns", "merged")]
    return [case for case in cases if case.name in names]


class Measurement:
    """One case, measured in ``root``, which nothing else uses."""

    def __init__(self, case: Case, root: Path, settings: Settings):
        self.case = case
        self.geometry = GEOMETRIES[case.geometry]
        self.n_bytes = case.pages * self.geometry.page_bytes
        self.others_cpu_share = 0.0
        self.growth_bytes: list[int] = []
        self.samples: defaultdict[str, list[Sample]] = defaultdict(list)
        self._staging_bytes = int(settings.staging_bytes)
        self._reader = LayerwiseReader(
            self.geometry,
            staging_bytes=self._staging_bytes,
            threads=_threads(settings),
            chunk_bytes=CHUNK_BYTES,
        )
        self._store = AgentStateStore(
            # A level deeper than in a page directory: no engine's store may be mistaken for it.
            root / "store" / "rank0",
            self.geometry,
            self._reader,
            spill_staging_bytes=settings.spill_staging_bytes,
            pages_an_extent=PAGES_A_TURN if case.name in ("turns", "merged") else None,
            merged=case.name == "merged",
            straight=case.name != "staged",
        )
        self._sizes = self._store.sizes(case.pages)
        self._device = Device(root / "device", readers=_threads(settings), largest_bytes=max(self._sizes))
        self.others, self.left_out = alternatives(root, self.geometry, _threads(settings))
        rows = min(case.pages, max(1, DEVICE_BYTES // self.geometry.page_bytes))
        self._source, self._target = DeviceMemory(self.geometry, rows), DeviceMemory(self.geometry, rows)
        self._source.fill(seed=case.pages)

    def run(self, rounds: int) -> None:
        # Touching memory for the first time and importing modules must not count.
        warm_up = min(self.case.pages, 1 + self._staging_bytes // self.geometry.page_bytes)
        for contender, pages in ((self._store, warm_up), *((other, 1) for other in self.others)):
            contender.write(self._source, pages, version=-1)
            contender.read(self._target)
            contender.delete()
        if self.case.name == "recycled":
            # The store reaches its quota before it is measured, so that every extent takes another one's space.
            self._store.limit(Quota(sum(self._sizes)))
            self._store.write(self._source, self.case.pages, version=rounds)
            self._device.write(self._sizes)
        machine = Machine()
        with _busy() if self.case.name == "busy" else nullcontext():
            for number in range(rounds):
                turns = [self._store_and_device, *(partial(self._alternative, other) for other in self.others)]
                first = number % len(turns)
                for turn in turns[first:] + turns[:first]:
                    turn(number)
            self.others_cpu_share = machine.others_cpu_share()

    def _store_and_device(self, number: int) -> None:
        store, device = self._store, self._device
        self._timed("store write", lambda: store.write(self._source, self.case.pages, version=number))
        reads = [
            partial(self._cold_read, "device read", store, lambda: device.read(store.files())),
            partial(self._cold_read, "store read", store, lambda: store.read(self._target), self.growth_bytes),
        ]
        for read in reads if number % 2 else reads[::-1]:
            read()
        if not number:
            some = store.files()[: 1 + DEVICE_BYTES // max(self._sizes)]
            device.copy_cached(some)
            share = self.n_bytes / sum(path.stat().st_size for path in some)
            self._timed("page cache", lambda: device.copy_cached(some), share)
        if self.case.name != "recycled":
            store.delete()
        self._timed("device write", lambda: device.write(self._sizes))
        if self.case.name != "recycled":
            device.delete()

    def _alternative(self, other: Contender, number: int) -> None:
        self._timed(f"{other.name} write", lambda: other.write(self._source, self.case.pages, version=number))
        self._cold_read(f"{other.name} read", other, lambda: other.read(self._target))
        other.delete()

    def _cold_read(
        self, name: str, files: Contender, read: Callable[[], None], growth_bytes: list[int] | None = None
    ) -> None:
        files.forget()
        self._target.clear()
        before = _peak_rss_bytes(reset=True)
        self._timed(name, read)
        if growth_bytes is not None:
            growth_bytes.append(_peak_rss_bytes() - before)
        if name != "device read" and not self._target.same(self._source):
            raise RuntimeError(f"{name}: the bytes that came back are not those that were written")

    def _timed(self, name: str, action: Callable[[], None], share: float = 1.0) -> None:
        cpu_s, started = _cpu_s(), time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        self.samples[name].append(Sample(seconds * share, (_cpu_s() - cpu_s) * share))

    def close(self) -> None:
        self._reader.close()
        self._store.close()
        self._device.delete()
        for other in self.others:
            other.delete()

    def gb_s(self, name: str) -> float:
        return self.n_bytes / 1e9 / median(sample.seconds for sample in self.samples[name])

    def cpu_s_per_gb(self, name: str) -> float:
        return median(sample.cpu_s for sample in self.samples[name]) / (self.n_bytes / 1e9)

    def row(self) -> dict[str, Any]:
        """The figures, medians of the rounds. What could not be measured is None."""
        speeds = {other.name: self.gb_s(f"{other.name} read") for other in self.others}
        best = max(speeds, key=lambda name: speeds[name], default=None)
        return {
            "case": self.case.name,
            "geometry": self.case.geometry,
            "tokens": self.case.pages * PAGE_SIZE,
            "kv_bytes": self.n_bytes,
            "page_bytes": self.geometry.page_bytes,
            "read_gb_s": self.gb_s("store read"),
            "device_read_gb_s": self.gb_s("device read"),
            "read_share_of_device": self._share("read"),
            "write_gb_s": self.gb_s("store write"),
            "device_write_gb_s": self.gb_s("device write"),
            "write_share_of_device": self._share("write"),
            "cpu_s_per_gb": self.cpu_s_per_gb("store read"),
            "write_cpu_s_per_gb": self.cpu_s_per_gb("store write"),
            "page_cache_gb_s": self.gb_s("page cache"),
            "best_alternative": best,
            "ratio_to_best_alternative": None if best is None else self._ratio("store read", f"{best} read"),
            "best_alternative_cpu_s_per_gb": None if best is None else self.cpu_s_per_gb(f"{best} read"),
            "alternatives": {
                other.name: {
                    "read_gb_s": self.gb_s(f"{other.name} read"),
                    "cpu_s_per_gb": self.cpu_s_per_gb(f"{other.name} read"),
                    "write_gb_s": self.gb_s(f"{other.name} write"),
                    "write_cpu_s_per_gb": self.cpu_s_per_gb(f"{other.name} write"),
                }
                for other in self.others
            },
            "others_cpu_share": self.others_cpu_share,
            "staging_bytes": self._staging_bytes,
            # Of the rounds after the staging memory has come, which is taken as it is first used.
            "peak_rss_growth_bytes": min(self.growth_bytes),
            "seconds": {name: [sample.seconds for sample in found] for name, found in self.samples.items()},
        }

    def _share(self, what: str) -> float:
        return self._ratio(f"store {what}", f"device {what}")

    def _ratio(self, name: str, other: str) -> float:
        """How many times as fast, as the median of the rounds: a disk that is slow for a while slows both."""
        pairs = zip(self.samples[name], self.samples[other], strict=True)
        return median(theirs.seconds / ours.seconds for ours, theirs in pairs)


class Machine:
    """What the processors do from now on."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def others_cpu_share(self) -> float:
        """The share of the processors' time that other processes had, those of `_busy` among them, or that the host
        kept for itself: if it is not small, figures are those of a busy machine."""
        total, idle, own = (now - before for now, before in zip(self._seconds(), self._before, strict=True))
        return max(0.0, 1 - (idle + own) / total)

    def _seconds(self) -> tuple[float, float, float]:
        # user, nice, system, idle, iowait, irq, softirq, steal; then guest times, which are in user already.
        ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / hertz, (ticks[3] + ticks[4]) / hertz, _cpu_s()


@contextmanager
def _busy() -> Iterator[None]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    computing = [subprocess.Popen([sys.executable, "-c", BUSY], env=environment) for _ in range(BUSY_PROCESSES)]
    try:
        yield
    finally:
        for process in computing:
            process.kill()
            process.wait()


def _cpu_s() -> float:
    """Processor time of this process, its threads included, in user mode and in the kernel. Work that the kernel does
    on threads of its own, such as writing back dirty pages, is in nobody's account."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_rss_bytes(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """What `main` prints: restores, and writes."""

    def empty(title: str, *names: str) -> Table:
        return Table("case", "geometry", *(Column(name, justify="right") for name in ("tokens", *names)), title=title)

    reads = empty("cold restores", "GB/s", "of device", "CPU s/GB", "best alternative", "GB/s", "ratio", "CPU s/GB")
    writes = empty("durable writes", "GB/s", "of device", "CPU s/GB")
    for row in rows:
        case = (row["case"], row["geometry"], f"{row['tokens']:,}")
        figures = [f"{row['read_gb_s']:.2f}", f"{row['read_share_of_device']:.0%}", f"{row['cpu_s_per_gb']:.2f}"]
        if (best := row["best_alternative"]) is not None:
            figures += [best, f"{row['alternatives'][best]['read_gb_s']:.2f}"]
            figures += [f"{row['ratio_to_best_alternative']:.2f}", f"{row['best_alternative_cpu_s_per_gb']:.2f}"]
        reads.add_row(*case, *figures)
        figures = [f"{row['write_gb_s']:.2f}", f"{row['write_share_of_device']:.0%}"]
        writes.add_row(*case, *figures, f"{row['write_cpu_s_per_gb']:.2f}")
    yield reads
    yield writes


def main(arguments: Sequence[str]) -> int:
    settings = Settings()
    parser = argparse.ArgumentParser(prog="agentstate pages bench", description=__doc__)
    parser.add_argument("--geometry", default=",".join(GEOMETRIES), help="of %(default)s, the main one first")
    parser.add_argument("--tokens", default="4096,16384,65536", help="lengths of contexts (default: %(default)s)")
    parser.add_argument("--case", default=",".join(CASES), help="what to measure, of %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="figures are medians of so many (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=settings.pages_path, help="a directory of the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    geometries, names = options.geometry.split(","), options.case.split(",")
    tokens = [int(number) for number in options.tokens.split(",")]
    for given, known in ((geometries, GEOMETRIES), (names, CASES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if options.rounds < 1 or min(tokens) < PAGE_SIZE:
        parser.error(f"at least one round, and at least the {PAGE_SIZE} tokens of a page")

    cases, rows, left_out = suite(names, geometries, tokens), [], set[str]()
    options.dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as directory,
        Progress(*Progress.get_default_columns(), "{task.fields[case]}", console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("measuring", total=sum(case.pages for case in cases), case="")
        for case in cases:
            progress.update(task, case=f"{case.name}, {case.geometry}, {case.pages * PAGE_SIZE:,} tokens")
            measurement = Measurement(case, Path(directory), settings)
            try:
                measurement.run(options.rounds)
            finally:
                measurement.close()
            rows.append(measurement.row())
            left_out.update(measurement.left_out)
            progress.advance(task, case.pages)
            if options.json is not None:
                asked = {"rounds": options.rounds, "read_threads": _threads(settings)}
                results.write(options.json, results.record("pages", asked, rows))
    for shown in tables(rows):
        console.print(shown)
    console.print(
        f"medians of {options.rounds} rounds on {os.cpu_count()} processors; {_threads(settings)} threads read, "
        f"one writes, {int(settings.staging_bytes) >> 20} MiB of staging; memory taken during a "
        f"restore: {max(row['peak_rss_growth_bytes'] for row in rows) >> 10:,} KiB at most; "
        f"page cache to memory: {median(row['page_cache_gb_s'] for row in rows):.1f} GB/s; other processes had "
        f"{median(row['others_cpu_share'] for row in rows):.0%} of the processors"
    )
    if left_out:
        console.print(
            f"left out, because {sys.executable} cannot import them: {', '.join(sorted(left_out))}; set "
            "AGENTSTATE_ENGINE_PYTHON to the Python of an environment that has SGLang",
            markup=False,
        )
    return 0


if __name__ == "__main__":
    # Threads of a pool that spin while they wait would take the processors from everything that is measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main(sys.argv[1:]))

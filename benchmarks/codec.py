"""`agentstate bench codec`: what coding without loss saves on real KV, and what it costs.

The KV is what an engine has stored in a page directory, or what a model computes for the text of AgentState's own
source. Each component of each layer is coded and decoded by itself, on one thread, as a spill, an upload and a restore
do it, and compared.

Then the pages are read over links of some bandwidth, again and again up to ``--mib``: through a shared store's tier,
verified, into the reader's memory, and nothing else is done with them. A link is modelled: it gives a range when all
bytes asked for so far would have come over it, and costs no processor. Raw and coded extents alternate, round by
round, in one run.

    python -m agentstate.benchmarks.codec CHECKPOINT TOKENS DIRECTORY     where torch is: the model's KV, as extents
"""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np
from rich.table import Column, Table

import agentstate
from agentstate.benchmarks import results
from agentstate.benchmarks.stacks import checkpoint_of
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import interval, paired_ratio
from agentstate.cli import launcher
from agentstate.errors import SettingsError
from agentstate.pages import (
    Geometry,
    LayerwiseReader,
    PageKeys,
    PageStore,
    codec,
    fingerprint,
    inventory,
    native,
    staging_memory,
)
from agentstate.pages.codec import Codec
from agentstate.pages.files import header_of, opened
from agentstate.pages.rewriting import read_pages
from agentstate.settings import Settings
from agentstate.tiers import Page, Range, Reading, SharedExtents, Tier
from agentstate.tiers.interface import settle
from agentstate.tiers.pages import Listed, SharedPages

PAGE_TOKENS = 64
PAGES_AN_EXTENT = 32
CODECS: tuple[Codec, ...] = ("raw", "lossless")
_CHUNK_BYTES = 8 << 20
_STAGING_BYTES = 256 << 20
_READERS = 8


@dataclass(frozen=True)
class Kv:
    """Some extents of one store, as files. Each is raw."""

    paths: list[Path]
    fingerprint: bytes
    geometry: Geometry

    @classmethod
    def of(cls, directory: Path, most_bytes: int) -> Kv:
        """Of the store with the most bytes below a page directory, as many extents as ``most_bytes`` have room for."""
        stores = sorted(inventory.store_directories(directory), key=lambda store: -inventory.total_bytes([store]))
        reports = list(inventory.extents(stores[0])) if stores else []
        paths, headers, left = [], [], most_bytes
        for report in sorted(reports, key=lambda report: -report.n_bytes):
            if report.header is not None and report.header.coding is None and report.n_bytes <= left:
                paths.append(report.path)
                headers.append(report.header)
                left -= report.n_bytes
        if not paths:
            raise SettingsError(f"there are no raw extents below {directory}")
        return cls(paths, headers[0].fingerprint, headers[0].geometry)

    def parts(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each layer and component of each extent, with the bytes of its pages."""
        for path in self.paths:
            with opened(path) as file:
                header = header_of(file, path.name)
                for layer in range(self.geometry.layers):
                    pages = [np.empty((len(header.keys), size), np.uint8) for size in self.geometry.component_bytes]
                    read_pages(file, header, layer, 0, pages)
                    yield from ((layer, component, rows) for component, rows in enumerate(pages))


def compute(checkpoint: Path, tokens: int, directory: Path) -> None:
    """Write the KV that a model computes in bfloat16, in extents like an engine's. Where torch is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "\n".join(path.read_text() for path in sorted(Path(agentstate.__file__).parent.glob("pages/*.py")))
    numbers = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"][:tokens]
    pages = len(numbers) // PAGE_TOKENS
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    cache = None
    with torch.inference_mode():
        for start in range(0, pages * PAGE_TOKENS, 512):
            some = torch.tensor([numbers[start : min(start + 512, pages * PAGE_TOKENS)]])
            cache = model(some, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    assert cache is not None
    layers = [
        [
            kept[0].transpose(0, 1).contiguous().view(torch.uint8).reshape(pages, -1).numpy()
            for kept in (layer.keys, layer.values)
        ]
        for layer in cache.layers
    ]
    geometry = Geometry(len(layers), PAGE_TOKENS, tuple(rows.shape[1] for rows in layers[0]))
    store = PageStore(directory / "store" / "rank0", fingerprint(benchmark="codec"), geometry)
    for first in range(0, pages, PAGES_AN_EXTENT):
        chosen = range(first, min(first + PAGES_AN_EXTENT, pages))
        keys = [number.to_bytes(32, "little") for number in chosen]
        draft = store.draft(keys, staging_memory(store.draft_bytes(len(keys))))
        for layer, components in enumerate(layers):
            for component, rows in enumerate(components):
                draft.component(layer, component)[:] = rows[chosen.start : chosen.stop]
        store.publish(draft)
    store.close()


@contextmanager
def kv_of(settings: Settings, model: str, tokens: int) -> Iterator[Path]:
    """A page directory with the KV of a model, computed where torch is."""
    checkpoint = checkpoint_of(settings, model)
    python = launcher.engine_python(settings)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir) as made:
        command = [python, "-W", "ignore", "-m", "agentstate.benchmarks.codec", str(checkpoint), str(tokens), made]
        if subprocess.run(command, check=False).returncode:
            raise SettingsError("the model's KV was not computed; the lines above say why")
        yield Path(made)


def ratios(kv: Kv) -> list[dict[str, Any]]:
    """A row a layer and component: coded ÷ raw bytes, and the tables' kinds. Every byte is compared."""
    raw: defaultdict[tuple[int, int], int] = defaultdict(int)
    coded: defaultdict[tuple[int, int], int] = defaultdict(int)
    for layer, component, pages in kv.parts():
        into, lengths = np.empty(pages.size, np.uint8), np.zeros(len(pages), "<u4")
        table = codec.encode(pages, into, lengths)
        n_bytes = int(lengths.sum())
        back = np.empty_like(pages)
        codec.decode(table, pages.shape[1], into[:n_bytes], lengths, [back])
        if not np.array_equal(back, pages):
            raise RuntimeError("what was decoded is not what was coded")
        raw[layer, component] += pages.size
        coded[layer, component] += n_bytes
    return [
        {"part": "ratio", "layer": layer, "component": component, "ratio": coded[layer, component] / n_bytes}
        for (layer, component), n_bytes in sorted(raw.items())
    ]


def speeds(kv: Kv, rounds: int) -> list[dict[str, Any]]:
    """A row for the extension, if there is one, and one for Python: bytes of pages a second of a core, of
    one thread."""
    parts = [pages for _, _, pages in kv.parts()]
    total = sum(pages.size for pages in parts)
    into, back = staging_memory(max(pages.size for pages in parts)), staging_memory(max(pages.size for pages in parts))
    rows = []
    for way in ("native", "python"):
        with patch.object(native, "library", native.library if way == "native" else None):
            if way == "native" and native.library is None:
                continue
            some = parts if way == "native" else parts[: max(1, len(parts) // 8)]
            encode_s, decode_s = [], []
            for _ in range(rounds + 1):
                encoding_s = decoding_s = 0.0
                for pages in some:
                    lengths = np.zeros(len(pages), "<u4")
                    began_s = time.thread_time()
                    table = codec.encode(pages, into, lengths)
                    encoding_s += time.thread_time() - began_s
                    given, place = into[: int(lengths.sum())], back[: pages.size].reshape(pages.shape)
                    began_s = time.thread_time()
                    codec.decode(table, pages.shape[1], given, lengths, [place])
                    decoding_s += time.thread_time() - began_s
                encode_s.append(encoding_s)
                decode_s.append(decoding_s)
            gb = sum(pages.size for pages in some) / 1e9
            rows.append(
                {
                    "part": "speed",
                    "way": way,
                    "bytes": total,
                    "encode_gb_s": gb / median(encode_s[1:]),
                    "decode_gb_s": gb / median(decode_s[1:]),
                }
            )
    return rows


class Wire(Tier):
    """Objects in memory behind a link of ``bits_per_s``, as it is set: what is asked for comes in order."""

    def __init__(self) -> None:
        self.bits_per_s = 1e9
        self.objects: dict[str, bytes] = {}
        self._asked: queue.SimpleQueue[tuple[float, str, Sequence[Range], Reading] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        free_s = 0.0
        while (asked := self._asked.get()) is not None:
            asked_s, name, ranges, reading = asked
            n_bytes = sum(len(wanted.into) for wanted in ranges)
            # From when it was asked for: a link does not wait for this thread.
            free_s = max(free_s, asked_s) + n_bytes * 8 / self.bits_per_s
            time.sleep(max(0.0, free_s - time.perf_counter()))
            data = memoryview(self.objects[name])
            for offset, into in ranges:
                reading.deliver(into, data[offset : offset + len(into)])
            settle(reading, None)

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        reading = Reading()
        self._asked.put((time.perf_counter(), name, ranges, reading))
        return reading

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        file.seek(0)
        self.objects[name] = file.read() + trailer
        return _done(True)

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        return _done(proposed)

    def drop(self, name: str) -> Future[None]:
        self.objects.pop(name, None)
        return _done(None)

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return _done(Page([], None))

    def sweep(self, older_than_s: float) -> Future[int]:
        return _done(0)

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def over_links(kv: Kv, gigabits: Sequence[float], times: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """A row a link: seconds for all pages, each so many ``times``, raw and coded, and how much sooner the coded ones
    are there."""
    rows = []
    with Wire() as wire:
        chains, opened_ = {}, {}
        for chosen in CODECS:
            extents = SharedExtents(wire, codec=chosen)
            pages = SharedPages(directory / chosen, extents, kv.fingerprint, kv.geometry)
            chain: list[bytes] = []
            for number, path in enumerate(kv.paths, 1):
                published = extents.publish(path, "rank0").result()
                with opened(path) as file:
                    keys = header_of(file, path.name).keys
                pages.enter([Listed(number, published.name, published.n_bytes, "", PageKeys.of(keys))])
                chain += keys
            chains[chosen], opened_[chosen] = list(dict.fromkeys(chain)) * times, pages
        readers = {
            chosen: LayerwiseReader(
                kv.geometry,
                staging_bytes=_STAGING_BYTES,
                threads=_READERS,
                chunk_bytes=_CHUNK_BYTES,
                open_extent=opened_[chosen].open,
            )
            for chosen in CODECS
        }
        for link in gigabits:
            wire.bits_per_s = link * 1e9
            seconds: defaultdict[str, list[float]] = defaultdict(list)
            cpu_s: defaultdict[str, list[float]] = defaultdict(list)
            n_bytes: dict[str, int] = {}
            for number in range(-1, rounds):
                for chosen in CODECS if number % 2 else CODECS[::-1]:
                    began_cpu_s, began_s = time.process_time(), time.perf_counter()
                    n_bytes[chosen] = _read(readers[chosen], opened_[chosen], chains[chosen])
                    if number >= 0:  # the first touches memory
                        seconds[chosen].append(time.perf_counter() - began_s)
                        cpu_s[chosen].append(time.process_time() - began_cpu_s)
            ratio, low, high = paired_ratio(seconds["raw"], seconds["lossless"])
            rows.append(
                {
                    "part": "link",
                    "gigabits": link,
                    "raw_bytes": n_bytes["raw"],
                    "coded_bytes": n_bytes["lossless"],
                    "raw_s": median(seconds["raw"]),
                    "coded_s": median(seconds["lossless"]),
                    # Of all threads, the link's too.
                    "raw_cpu_s_per_gb": median(cpu_s["raw"]) / n_bytes["raw"] * 1e9,
                    "coded_cpu_s_per_gb": median(cpu_s["lossless"]) / n_bytes["raw"] * 1e9,
                    "sooner": ratio,
                    "sooner_95": [low, high],
                }
            )
        for chosen in CODECS:
            readers[chosen].close()
            opened_[chosen].close()
    return rows


def _read(reader: LayerwiseReader, pages: SharedPages, chain: Sequence[bytes]) -> int:
    n_bytes = 0
    with reader.open(pages.pin(chain)) as stream:
        for chunk in stream:
            if chunk.unusable():
                raise RuntimeError("a page came back that is not what was written")
            n_bytes += chunk.n_bytes
    return n_bytes


def run(source: Path, name: str, gigabits: Sequence[float], mib: int, rounds: int, report: Path | None) -> None:
    """Measure the KV in the page directory ``source`` and print it."""
    kv = Kv.of(source, mib << 20)
    found, of_speed = ratios(kv), speeds(kv, rounds)
    # A second of a fast link is more than a short context.
    times = max(1, (mib << 20) // of_speed[0]["bytes"])
    with tempfile.TemporaryDirectory() as directory:
        rows = [*found, *of_speed, *over_links(kv, gigabits, times, rounds, Path(directory))]
    _print(rows)
    if report is not None:
        settings = {"kv": name, "mib": mib, "rounds": rounds, "native": native.library is not None}
        results.write(report, results.record("codec", settings, rows))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    by_layer: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["part"] == "ratio":
            by_layer[row["layer"]].append(row["ratio"])
    several = len(by_layer[0]) == 2
    names = ("K", "V") if several else tuple(f"component {number}" for number in range(len(by_layer[0])))
    table = Table("layers", *(Column(f"{name}, ÷ raw", justify="right") for name in names))
    for first, last in _grouped(by_layer):
        of = [by_layer[layer] for layer in range(first, last + 1)]
        cells = [f"{sum(each) / len(each):.4f}" for each in zip(*of, strict=True)]
        table.add_row(f"{first}" if first == last else f"{first}–{last}", *cells)
    console.print(table)
    table = Table("one core", Column("encoded, GB/s", justify="right"), Column("decoded, GB/s", justify="right"))
    for row in rows:
        if row["part"] == "speed":
            table.add_row(row["way"], f"{row['encode_gb_s']:.2f}", f"{row['decode_gb_s']:.2f}")
    console.print(table)
    names = ("raw, s", "CPU s/GB", "coded, s", "CPU s/GB", "sooner", "95 %")
    table = Table("link", *(Column(name, justify="right") for name in names))
    for row in rows:
        if row["part"] == "link":
            sooner = f"{row['sooner']:.3f}×", interval(row["sooner_95"])
            cells = [f"{row[f'{way}_{figure}']:.3f}" for way in ("raw", "coded") for figure in ("s", "cpu_s_per_gb")]
            table.add_row(f"{row['gigabits']:g} Gb/s", *cells, *sooner)
    console.print(table)


def _grouped(layers: Any) -> list[tuple[int, int]]:
    """At most eight groups of neighbouring layers."""
    count = len(layers)
    ends = [round(number * count / min(count, 8)) for number in range(min(count, 8) + 1)]
    return [(first, last - 1) for first, last in pairwise(ends)]


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        compute(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

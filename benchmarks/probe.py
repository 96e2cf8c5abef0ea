"""A running engine's calibration record: what `agentstate.benchmarks.calibration` fits and the simulator runs on."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import unseen

DECODED = 17  # tokens; the first comes from the prefill
CROWD = (2, 4)
"""How many sequences are decoded at once, beside one alone."""


async def probe(
    engine_url: str,
    stat: Callable[[], dict[str, Any]],
    *,
    name: str,
    source: str,
    layers: int,
    token_bytes: int,
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 6144),
    new_tokens: Sequence[int] = (16, 64, 256),
    repeats: int = 3,
    pauses_s: tuple[float, float] = (1.0, 5.0),
    say: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Measure an idle engine with the store on and break-even off. ``stat`` returns what it says of itself
    (`agentstate.fleet.control`). The pool has room for the longest of ``lengths`` with the most of ``new_tokens`` and
    an answer of ``DECODED``.

    For each length: the prompt computed, then with each of ``new_tokens`` after it as a memory hit, and with the second
    of them restored after a flush, medians of ``repeats``, each with one token of answer; and answers of ``DECODED``
    tokens. Decoding is measured after a memory hit, as agents do it: the slots of such a context do not lie together.

    Requests follow each other closely, except that a restore, and the memory hit that it is compared with, come after
    the first of ``pauses_s``. The cost of standing idle is measured after both.

    The time of a read is the engine's own count of its restores, a line through their bytes. The further cost of
    restoring is how much longer the time to the first token is than `Simulation` would give with those reads. Host
    memory is given the rate of a read: nothing better is known without a look inside.
    """
    async with Engine(engine_url) as engine:
        probing = _Probing(engine, stat, repeats, pauses_s[0])
        arguments = await engine.arguments()
        await engine.ask(unseen(64), 1)  # the first request of an engine takes longer
        for length in lengths:
            say(f"{length:,} tokens")
            await probing.measure(length, new_tokens)
        say("requests at once")
        await probing.crowds(min(lengths) // 2, min(new_tokens))
        request_s = await probing.request_s(min(lengths), new_tokens[1])
        say("after a pause")
        longer_s = [statistics.median(probing.longer_s), await probing.paused(pauses_s[1], min(lengths), new_tokens[1])]
    read_s, read_rate = _line(probing.reads)
    write_s, write_rate = _line(probing.writes)
    return {
        "name": name,
        "source": source,
        "page_tokens": int(arguments["page_size"]),
        "token_bytes": token_bytes,
        "layers": layers,
        "chunk_tokens": int(arguments["chunked_prefill_size"]),
        "max_running": int(arguments.get("max_running_requests") or 256),
        "request_s": round(request_s, 5),
        "read_s": round(read_s, 5),
        "write_s": round(write_s, 5),
        "restore_s": round(_restore_s(probing.restores, request_s, layers), 5),
        "idle": [[pause_s, round(max(0.0, more), 5)] for pause_s, more in zip(pauses_s, longer_s, strict=True)],
        "late_results": statistics.median(probing.late_steps) > 0.5,
        "restore_gb_per_s": round(read_rate / 1e9, 4),
        "host_gb_per_s": round(read_rate / 1e9, 4),
        "write_gb_per_s": round(write_rate / 1e9, 4),
        "prefill": [{**point, "seconds": round(point["seconds"], 5)} for point in probing.prefill],
        "decode": [{**point, "seconds": round(point["seconds"], 6)} for point in probing.decode],
    }


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The findings of probes of one engine, as one record: all points, and the means of single figures."""
    measured = ("request_s", "read_s", "write_s", "restore_s", "restore_gb_per_s", "host_gb_per_s", "write_gb_per_s")
    return {
        **records[0],
        **{name: statistics.mean(record[name] for record in records) for name in measured},
        "idle": [
            [pauses[0][0], statistics.mean(longer_s for _, longer_s in pauses)]
            for pauses in zip(*(record["idle"] for record in records), strict=True)
        ],
        **{points: [point for record in records for point in record[points]] for points in ("prefill", "decode")},
    }


class _Probing:
    """One probe's measurements.

    ``reads`` are (bytes, seconds) of each restore as the engine counts them, ``writes`` those of what followed a prompt
    until nothing waited to be written. ``restores`` are seconds (to the first token as a memory hit, the same restored,
    of its read), all after a pause, and ``longer_s`` what the pause costs a hit. ``late_steps`` is how many decoding
    steps later the first token comes when others follow it.
    """

    def __init__(self, engine: Engine, stat: Callable[[], dict[str, Any]], repeats: int, pause_s: float):
        self._engine, self._stat, self._repeats, self._pause_s = engine, stat, repeats, pause_s
        self.prefill: list[dict[str, Any]] = []
        self.decode: list[dict[str, Any]] = []
        self.reads: list[tuple[float, float]] = []
        self.restores: list[tuple[float, float, float]] = []
        self.longer_s: list[float] = []
        self.late_steps: list[float] = []
        self.writes: list[tuple[float, float]] = []

    async def measure(self, length: int, new_tokens: Sequence[int]) -> None:
        await self._computed(length)
        prompt = unseen(length)
        await self._engine.ask(prompt, 1)
        for new in new_tokens:
            hits = [await self._hit(prompt, new) for _ in range(self._repeats)]
            hit_s = statistics.median(hit.ttft_s for hit in hits)
            cached = hits[0].device_tokens
            self.prefill.append({"cached": cached, "new": length + new - cached, "seconds": hit_s})
            if new == new_tokens[0]:
                await self._decoded(prompt, new, hit_s)
            elif new == new_tokens[1]:
                await self._restored(prompt, new, hit_s)

    async def _computed(self, length: int) -> None:
        times = []
        for _ in range(self._repeats):
            before = await self._settled()
            times.append((await self._engine.ask(unseen(length), 1)).ttft_s)
            started_s = time.perf_counter()
            after = await self._settled()
            written = after["spill"]["bytes_spilled"] - before["spill"]["bytes_spilled"]
            self.writes.append((written, time.perf_counter() - started_s))
        self.prefill.append({"cached": 0, "new": length, "seconds": statistics.median(times)})

    async def _hit(self, prompt: list[int], new: int, pause_s: float = 0.0) -> Answer:
        await self._settled()
        await asyncio.sleep(pause_s)
        return await self._engine.ask(prompt + unseen(new), 1)

    async def _restored(self, prompt: list[int], new: int, hit_s: float) -> None:
        hits, restored, read_s = [], [], []
        for _ in range(self._repeats):
            before = (await self._settled())["restore"]
            await self._engine.flush()
            restored.append((await self._hit(prompt, new, self._pause_s)).ttft_s)
            after = (await self._settled())["restore"]
            self.reads.append((after["bytes_read"] - before["bytes_read"], after["seconds"] - before["seconds"]))
            read_s.append(self.reads[-1][1])
            hits.append((await self._hit(prompt, new, self._pause_s)).ttft_s)
        self.restores.append((statistics.median(hits), statistics.median(restored), statistics.median(read_s)))
        self.longer_s.append(statistics.median(hits) - hit_s)

    async def paused(self, pause_s: float, length: int, new: int) -> float:
        """How much longer a memory hit takes after a pause."""
        prompt = unseen(length)
        await self._engine.ask(prompt, 1)
        found = []
        for _ in range(self._repeats):
            paused = await self._hit(prompt, new, pause_s)
            found.append(paused.ttft_s - (await self._hit(prompt, new)).ttft_s)
        return statistics.median(found)

    async def _decoded(self, prompt: list[int], new: int, hit_s: float) -> None:
        steps = []
        for _ in range(self._repeats):
            await self._settled()
            answer = await self._engine.ask(prompt + unseen(new), DECODED)
            steps.append(_step_s(answer))
            self.late_steps.append((answer.ttft_s - hit_s) / steps[-1])
        context = len(prompt) + new + DECODED // 2
        self.decode.append({"sequences": 1, "context_tokens": context, "seconds": statistics.median(steps)})

    async def crowds(self, length: int, new: int) -> None:
        """Decode several sequences at once, each of ``length`` tokens and ``new`` ones after them."""
        prompts = [unseen(length) for _ in range(max(CROWD))]
        for prompt in prompts:
            await self._engine.ask(prompt, 1)
        for count in CROWD:
            steps = []
            for _ in range(self._repeats):
                await self._settled()
                asked = (self._engine.ask(prompt + unseen(new), DECODED) for prompt in prompts[:count])
                answers = await asyncio.gather(*asked)
                # When the last one has its first token, all of them are being decoded.
                steps.append(_step_s(max(answers, key=lambda answer: answer.ttft_s)))
            context = count * (length + new + DECODED // 2)
            self.decode.append({"sequences": count, "context_tokens": context, "seconds": statistics.median(steps)})

    async def request_s(self, length: int, new: int) -> float:
        """What a request takes besides its forward. Of two requests, the second comes while the first is computed: it
        waits for two forwards, and takes that once."""
        prompt = unseen(length)
        await self._engine.ask(prompt, 1)
        found = []
        for _ in range(self._repeats + 2):
            await self._settled()
            alone_s = (await self._engine.ask(prompt + unseen(new), 1)).ttft_s
            await self._settled()
            started_s = time.perf_counter()
            first = asyncio.create_task(self._engine.ask(prompt + unseen(new), 1))
            await asyncio.sleep(alone_s / 4)
            later_s = time.perf_counter() - started_s
            second = await self._engine.ask(prompt + unseen(new), 1)
            await first
            found.append(2 * alone_s - later_s - second.ttft_s)
        return max(0.0, statistics.median(found))

    async def _settled(self) -> dict[str, Any]:
        """What the engine says of itself once nothing waits to be stored."""
        while (told := await asyncio.to_thread(self._stat))["spill"]["waiting"]:
            await asyncio.sleep(0.005)
        return told


def _step_s(answer: Answer) -> float:
    return (answer.total_s - answer.ttft_s) / (len(answer.tokens) - 1)


def _line(transfers: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The fixed time of a transfer, in seconds, and its rate besides that, in bytes a second. Transfers are (bytes,
    seconds)."""
    n_bytes, seconds = zip(*transfers, strict=True)
    if len(set(n_bytes)) > 1:
        byte_s, fixed_s = statistics.linear_regression(n_bytes, seconds)
        if byte_s > 0 and fixed_s > 0:
            return fixed_s, 1 / byte_s
    return 0.0, sum(n_bytes) / sum(seconds)


def _restore_s(restores: Sequence[tuple[float, float, float]], request_s: float, layers: int) -> float:
    """How much longer a restored request takes than one whose layers come as simulated."""
    more = []
    for hit_s, restored_s, read_s in restores:
        forward_s = hit_s - request_s
        waited_for_s = max(forward_s + read_s / layers, read_s + forward_s / layers)
        more.append(restored_s - request_s - waited_for_s)
    return max(0.0, statistics.median(more))

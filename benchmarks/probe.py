"""A running engine's calibration record: what `benchmarks.calibration` fits and the simulator runs on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.engine import Engine
from benchmarks.replay import unseen

DECODED = 17  # tokens; the first comes from the prefill


async def probe(
    engine_url: str,
    *,
    name: str,
    source: str,
    layers: int,
    token_bytes: int,
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 6144),
    new_tokens: Sequence[int] = (64, 256),
    repeats: int = 3,
    say: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Measure an idle engine with the store on. For each of ``lengths``: the prompt computed once, then with each of
    ``new_tokens`` after it as a memory hit and restored after a flush, medians of ``repeats``.

    The rate of a restore is the one at which `Simulation` gives the measured time to first token of the longest
    prompt, so that it holds everything that a restore takes. Host memory is given the same rate, and writing too:
    both are the most that is known without a look inside.
    """
    async with Engine(engine_url) as engine:
        arguments = await engine.arguments()
        page_tokens = int(arguments["page_size"])
        prefill: list[dict[str, Any]] = []
        decode: list[dict[str, Any]] = []
        restore: tuple[int, float, float] | None = None  # tokens, seconds to the first token, the same as a hit
        await engine.ask(unseen(64), 1)  # the first request of an engine takes longer
        for length in lengths:
            say(f"{length:,} tokens")
            prompt = unseen(length)
            answer = await engine.ask(prompt, DECODED)
            prefill.append({"cached": 0, "new": length, "seconds": answer.ttft_s})
            step_s = (answer.total_s - answer.ttft_s) / (DECODED - 1)
            decode.append({"sequences": 1, "context_tokens": length + DECODED // 2, "seconds": step_s})
            for new in new_tokens:
                hits, restored = [], []
                for _ in range(repeats):
                    await engine.flush()
                    restored.append(await engine.ask(prompt + unseen(new), 1))
                    hits.append(await engine.ask(prompt + unseen(new), 1))
                hit_s = statistics.median(hit.ttft_s for hit in hits)
                cached = hits[0].device_tokens
                prefill.append({"cached": cached, "new": length + new - cached, "seconds": hit_s})
                if new == min(new_tokens):
                    restore = restored[0].restored_tokens, statistics.median(r.ttft_s for r in restored), hit_s
    assert restore is not None
    tokens, restored_s, hit_s = restore
    # The last layer runs when it is there, so that a layer's share of the forward comes after the last byte.
    rate = tokens * token_bytes / max(restored_s - hit_s / layers, 1e-6) / 1e9
    return {
        "name": name,
        "source": source,
        "page_tokens": page_tokens,
        "token_bytes": token_bytes,
        "layers": layers,
        "chunk_tokens": int(arguments["chunked_prefill_size"]),
        "max_running": int(arguments.get("max_running_requests") or 256),
        "request_s": 0.0,
        "restore_gb_per_s": round(rate, 4),
        "host_gb_per_s": round(rate, 4),
        "write_gb_per_s": round(rate, 4),
        "prefill": [{**point, "seconds": round(point["seconds"], 5)} for point in prefill],
        "decode": [{**point, "seconds": round(point["seconds"], 6)} for point in decode],
    }

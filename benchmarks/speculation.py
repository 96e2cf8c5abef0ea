"""How many drafts are accepted after a restore, against agents that were never suspended.

A draft model without its KV says nothing wrong: its drafts are refused, and each token costs a verification of its own.
So tokens alone do not show whether a restore was whole. The accept length does: the tokens that a verification yields,
the one that it computes itself among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer
from agentstate.benchmarks.peers.servers import FileLinkerServer, HiCache, Server
from agentstate.benchmarks.resumed import Contender, Event, Ours, Pair, resume
from agentstate.benchmarks.stacks import checkpoint_of, running, steps
from agentstate.benchmarks.terminal import console
from agentstate.cli import launcher
from agentstate.errors import AgentStateError, EngineError, SettingsError
from agentstate.settings import Settings

PEERS: dict[str, type[Server]] = {"file-linker": FileLinkerServer, "hicache": HiCache}
"""Other ways to keep KV, by their names on the command line."""
POOLS = ("--skip-tokenizer-init", "--max-total-tokens", "16384", "--chunked-prefill-size", "256")
"""What tiny models are served with."""
_EXACT = ("--dtype", "float32", *POOLS)
"""Tokens and drafts are compared: in bfloat16 those of another batch or chunk may differ, with a store or without."""
_CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
# As many states as SGLang would have fill most of a machine's memory.
STATES = ("--page-size", "1", "--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
STATES += ("--max-running-requests", "4", "--max-mamba-cache-size", "24")
_WHAT_PEERS_RAISE = (AgentStateError, httpx.HTTPError, OSError)


@dataclass(frozen=True)
class Algorithm:
    """One of SGLang's, on tiny models of `agentstate.benchmarks.drafting`: a ``target``, and a ``draft`` of a
    checkpoint of its own or none. ``keeps`` is whether drafts have KV."""

    algorithm: str
    target: str = "target"
    draft: str | None = None
    flags: tuple[str, ...] = _CHAIN
    keeps: bool = True

    @property
    def model(self) -> str:
        return f"tiny-{self.target}"

    def arguments(self, settings: Settings) -> tuple[str, ...]:
        """SGLang's, with the draft's checkpoint, which is made if it does not exist."""
        given = ("--speculative-algorithm", self.algorithm, *self.flags)
        if self.draft is None:
            return given
        return (*given, "--speculative-draft-model-path", str(checkpoint_of(settings, f"tiny-{self.draft}")))


ALGORITHMS = {
    "eagle": Algorithm("EAGLE", draft="eagle"),
    "eagle3": Algorithm("EAGLE3", draft="eagle3"),
    "standalone": Algorithm("STANDALONE", draft="draft"),
    "ngram": Algorithm("NGRAM", flags=("--speculative-num-draft-tokens", "4"), keeps=False),
    "mtp": Algorithm("EAGLE", target="mtp"),
    "mtp-sparse": Algorithm("EAGLE", target="sparse"),
    "mtp-linear": Algorithm("NEXTN", target="linear", flags=(*_CHAIN, *STATES)),
}
"""By their names on the command line; those of MTP by the model's shape."""


def speculation(
    settings: Settings, algorithms: Sequence[str], peers: Sequence[str], agents: int, report: Path | None
) -> None:
    """Print and keep the accept lengths, a row an algorithm, an engine and an event. Raises SettingsError for an
    unknown name, and EngineError, at the end, if a restore of ours was not like no eviction."""
    for name, known in (*((one, ALGORITHMS) for one in algorithms), *((one, PEERS) for one in peers)):
        if name not in known:
            raise SettingsError(f"there is no {name}: choose {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    with steps(len(algorithms) * (1 + len(peers))) as (say, step):
        for name in algorithms:
            with _contenders(settings, ALGORITHMS[name], peers) as contenders:
                for contender in contenders:
                    say(f"{name}, {contender.name}")
                    rows += _rows(name, contender, agents)
                    step()
    _print(rows)
    if report is not None:
        asked = {"algorithms": list(algorithms), "peers": list(peers), "agents": agents}
        results.write(report, results.record("speculation", asked, rows, [Path(launcher.engine_python(settings))]))
        console.print(f"raw result written to {report}")
    if worse := [row for row in rows if row["engine"] == Ours.name and not row["whole"]]:
        raise EngineError(f"{len(worse)} restores were not like no eviction, the first: {worse[0]}")


def row_of(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Their accept lengths: with a ``ratio`` of 1, as many drafts are accepted after a restore as without eviction.
    ``whole`` is whether each pair is the same, and was restored as a whole. Raises EngineError for an engine that does
    not draft."""
    kept, resumed = (_accept_length([pair[which] for pair in pairs]) for which in (0, 1))
    return {
        "never_evicted": round(kept, 4),
        "accept_length": round(resumed, 4),
        "ratio": round(resumed / kept, 4),
        "restored_tokens": sum(pair.resumed.restored_tokens for pair in pairs),
        "whole_tokens": sum(pair.never_evicted.device_tokens for pair in pairs),
        "identical": all(pair.never_evicted.tokens == pair.resumed.tokens for pair in pairs),
        "whole": all(pair.same and pair.whole for pair in pairs),
        "reason": None,
    }


def _accept_length(answers: Sequence[Answer]) -> float:
    if not all(answer.steps for answer in answers):
        raise EngineError("the engine does not say how often it verified drafts")
    # The first token is the prefill's.
    return sum(len(answer.tokens) - 1 for answer in answers) / sum(answer.steps or 0 for answer in answers)


def _rows(name: str, contender: Contender, agents: int) -> list[dict[str, Any]]:
    """A peer that fails has one row, with a ``reason``."""
    who = {"algorithm": name, "engine": contender.name}
    rows: list[dict[str, Any]] = []
    try:
        contender.start()
        for event in Event:
            pairs = asyncio.run(resume(contender, event, agents, warm=not ALGORITHMS[name].keeps))
            rows.append({**who, "event": str(event), **row_of(pairs)})
    except _WHAT_PEERS_RAISE as error:
        if isinstance(contender, Ours):
            raise
        said = str(error) or repr(error)
        console.print(f"{contender.name}: {said}", highlight=False, markup=False)
        reason = said.splitlines()[0].partition("; the end of")[0]
        rows.append({**who, "event": None, **_NOTHING, "reason": reason})
    finally:
        contender.stop()
    return rows


_NOTHING = dict.fromkeys(
    ("never_evicted", "accept_length", "ratio", "restored_tokens", "whole_tokens", "identical", "whole")
)


@contextmanager
def _contenders(settings: Settings, algorithm: Algorithm, peers: Sequence[str]) -> Iterator[list[Contender]]:
    arguments = (*_EXACT, *algorithm.arguments(settings))
    with running(settings, algorithm.model, arguments, start=False, AGENTSTATE_BREAK_EVEN="off") as stack:
        python, checkpoint = Path(launcher.engine_python(settings)), checkpoint_of(settings, algorithm.model)
        yield [Ours(stack), *(PEERS[name](stack.home / name, checkpoint, python, arguments) for name in peers)]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    numbers = ("never evicted", "restored", "÷", "tokens restored")
    right = (Column(name, justify="right") for name in numbers)
    table = Table("algorithm", "engine", "after", *right, "same", title="Accept length, in tokens a verification")
    for row in rows:
        if row["reason"] is not None:
            table.add_row(row["algorithm"], row["engine"], "–")
            continue
        table.add_row(
            row["algorithm"],
            row["engine"],
            row["event"],
            f"{row['never_evicted']:.3f}",
            f"{row['accept_length']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['restored_tokens']:,} of {row['whole_tokens']:,}",
            "yes" if row["identical"] else "NO",
        )
    console.print(table)
    for row in rows:
        if row["reason"] is not None:
            said = f"not measured: {row['algorithm']}, {row['engine']}: {row['reason']}"
            console.print(said, highlight=False, markup=False)

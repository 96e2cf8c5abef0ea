"""An engine's costs: the measured figures that the simulator runs on, and the cost model fitted to them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentstate.errors import SettingsError

DATA = resources.files("agentstate.benchmarks") / "data"


@dataclass(frozen=True)
class Calibration:
    """An engine's costs. A forward of *n* new tokens after *p* cached ones takes
    ``forward_s + n · token_s + n · (p + n/2) · pair_s``, a decoding step of *b* sequences with *c* tokens of context in
    all ``step_s + b · sequence_s + c · context_s``. Both leave out that a batch is not exactly the sum of its requests.
    ``request_s`` is what a request takes besides the engine's forwards; it delays no other request.

    Rates are in GB/s (10⁹ bytes) an engine. ``restore_gb_per_s`` is from the drive into the device with everything that
    this takes, ``host_gb_per_s`` from host memory into the device, ``write_gb_per_s`` from the device to the drive.
    A read takes ``read_s`` however short it is, evenly spread over the layers, and a write ``write_s``. A restored
    request makes its forward ``restore_s`` longer, besides the time that the forward waits for layers.

    ``late_results``: a forward's results are seen when the next one has run. SGLang starts a forward before it looks at
    the results of the one before. On a CPU, where starting a forward is running it, they are late; on a GPU they are
    not.

    ``idle``: how much longer the first forward takes after the engine has had nothing to do, as (seconds without work,
    seconds longer), in order; linear between them.
    """

    name: str
    source: str
    page_tokens: int
    token_bytes: int
    layers: int
    chunk_tokens: int
    max_running: int
    request_s: float
    forward_s: float
    token_s: float
    pair_s: float
    step_s: float
    sequence_s: float
    context_s: float
    restore_gb_per_s: float
    host_gb_per_s: float
    write_gb_per_s: float
    read_s: float = 0.0
    write_s: float = 0.0
    restore_s: float = 0.0
    late_results: bool = False
    idle: tuple[tuple[float, float], ...] = ()

    def chunk_s(self, cached: int, new: int) -> float:
        """A forward's time for ``new`` tokens after ``cached`` ones, without the fixed part."""
        return new * self.token_s + new * (cached + new / 2) * self.pair_s

    def prefill_s(self, cached: int, new: int) -> float:
        """The time of a whole prefill by itself, chunk after chunk."""
        return math.ceil(new / self.chunk_tokens) * self.forward_s + self.chunk_s(cached, new)

    def decode_s(self, sequences: int, context_tokens: float) -> float:
        """The time of one decoding step."""
        return self.step_s + sequences * self.sequence_s + context_tokens * self.context_s

    def cold_s(self, idle_s: float) -> float:
        """How much longer a forward takes after the engine had nothing to do for ``idle_s``."""
        if not self.idle:
            return 0.0
        since_s, longer_s = zip((0.0, 0.0), *self.idle, strict=True)
        return float(np.interp(idle_s, since_s, longer_s))

    def read_all_s(self, n_bytes: float) -> float:
        """The time of a read of ``n_bytes`` from the drive into the device."""
        return self.read_s + n_bytes / self.restore_gb_per_s / 1e9

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    @classmethod
    def load(cls, name: str | Path) -> Calibration:
        """The record in a file, or one that ships with the package, by name (`shipped`).

        The record is JSON: ``name``, ``source``, ``page_tokens``, ``token_bytes``, ``layers``, ``chunk_tokens``,
        ``max_running``, ``request_s``, the three rates, ``prefill`` (a list of ``{"cached", "new", "seconds"}``, each
        one request alone on an idle engine, from its start to its first and only token) and ``decode`` (a list of
        ``{"sequences", "context_tokens", "seconds"}``, each one step; the context is that of all sequences together).
        ``read_s``, ``write_s``, ``restore_s``, ``late_results`` and ``idle`` may be left out if they are nothing.

        Raises SettingsError for a file that is missing or is not such a record.
        """
        shipped = DATA / f"calibration_{name}.json"
        try:
            text = shipped.read_text() if shipped.is_file() else Path(name).read_text()
            return cls.fit(json.loads(text))
        except OSError as error:
            raise SettingsError(
                f"no calibration {name}: neither a file nor one of {', '.join(cls.shipped())}"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"{name} is not a calibration record: {error!r}") from error

    @staticmethod
    def shipped() -> list[str]:
        """The names of the records that ship with the package."""
        names = [item.name for item in DATA.iterdir()]
        return sorted(n[len("calibration_") : -len(".json")] for n in names if n.startswith("calibration_"))

    @classmethod
    def fit(cls, record: dict[str, Any]) -> Calibration:
        """The costs that come closest to a record's points, by relative error, none of them negative."""
        chunk_tokens = record["chunk_tokens"]
        forward_s, token_s, pair_s = _fit(
            [
                (math.ceil(p["new"] / chunk_tokens), p["new"], p["new"] * (p["cached"] + p["new"] / 2))
                for p in record["prefill"]
            ],
            [p["seconds"] - record["request_s"] for p in record["prefill"]],
        )
        step_s, sequence_s, context_s = _fit(
            [(1, p["sequences"], p["context_tokens"]) for p in record["decode"]],
            [p["seconds"] for p in record["decode"]],
        )
        return cls(
            **{name: record[name] for name in cls.__dataclass_fields__ if name in record and name != "idle"},
            idle=tuple((float(idle_s), float(longer_s)) for idle_s, longer_s in record.get("idle", ())),
            forward_s=forward_s,
            token_s=token_s,
            pair_s=pair_s,
            step_s=step_s,
            sequence_s=sequence_s,
            context_s=context_s,
        )


def _fit(rows: list[tuple[float, float, float]], seconds: list[float]) -> tuple[float, float, float]:
    """Weights of three features, none of them negative, that give ``seconds`` with the least relative error."""
    if not rows:
        raise ValueError("a calibration needs at least one measured point of each kind")
    measured = np.array(seconds)
    features = np.array(rows, dtype=float) / measured[:, None]
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    best: tuple[float, NDArray[np.float64]] | None = None
    # Three features have seven subsets: the best one whose weights are all positive is the exact answer.
    for subset in range(1, 8):
        columns = [index for index in range(3) if subset >> index & 1]
        weights = np.zeros(3)
        weights[columns] = np.linalg.lstsq((features / scale)[:, columns], np.ones(len(rows)), rcond=None)[0]
        error = float(np.square((features / scale) @ weights - 1).sum())
        if (weights >= 0).all() and (best is None or error < best[0] - 1e-12):
            best = error, weights
    if best is None:
        raise ValueError("no costs that are all positive fit the measured points")
    first, second, third = (float(weight) for weight in best[1] / scale)
    return first, second, third

"""A weight update: the store is closed while it runs, opened again where the weights are known, and nowhere else."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput, UpdateWeightFromDiskReqOutput
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from agentstate.errors import PageStoreLocked
from engine_patch import identity, plugin, radix_cache, rank
from engine_patch.radix_cache import AgentStateRadixCache, _LinkerWrapper
from engine_patch.rank import Rank
from engine_patch.sglang_api import PoolName
from engine_patch.weights import Weights, after_update, are_lost, damage


def request(**fields: Any) -> UpdateWeightFromDiskReqInput:
    return UpdateWeightFromDiskReqInput(model_path="new", **fields)


def output(success: bool, message: str = "") -> UpdateWeightFromDiskReqOutput:
    return UpdateWeightFromDiskReqOutput(success=success, message=message)


@pytest.mark.parametrize(
    ("flush", "success", "message", "weights"),
    [
        (True, True, "Succeeded to update model weights.", Weights.OF_FILES),
        (False, True, "Succeeded to update model weights.", Weights.IN_DOUBT),
        (True, False, "Failed to get weights iterator: no such directory.", Weights.SAME),
        (False, False, "Failed to get weights iterator: no such directory.", Weights.SAME),
        (True, False, "Failed to get model loader: a loader.", Weights.SAME),
        (True, False, "Failed to update weights: x.\nRolling back to original weights.", Weights.IN_DOUBT),
        (True, False, "Weights were updated, but the cache was not flushed because", Weights.IN_DOUBT),
        (True, False, "something new", Weights.IN_DOUBT),
    ],
)
def test_what_is_in_the_model_after_an_update_from_disk(
    flush: bool, success: bool, message: str, weights: Weights
) -> None:
    assert after_update(request(flush_cache=flush), output(success, message)) is weights


def test_sglang_says_so_before_it_loads_the_first_tensor() -> None:
    source = inspect.getsource(WeightUpdater.update_weights_from_disk)
    load = source.index("model = model_load_weights(")
    for message in ("Failed to get model loader", "Failed to get weights iterator"):
        assert source.count(message) == 1
        assert source.index(message) < load


@pytest.mark.parametrize(
    ("tags", "saver", "backup", "lost"),
    [
        (None, True, False, True),
        ([], True, False, True),
        (["weights"], True, False, True),
        (["kv_cache"], True, False, False),
        (["weights"], True, True, False),
        (None, False, False, False),
    ],
)
def test_weights_whose_memory_is_released_are_lost_unless_they_are_kept(
    tags: list[str] | None, saver: bool, backup: bool, lost: bool
) -> None:
    arguments = SimpleNamespace(enable_memory_saver=saver, enable_weights_cpu_backup=backup)
    assert are_lost(tags, arguments) is lost


@pytest.fixture(autouse=True)
def one_dp_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_cache, "model_group", lambda: None)


class Linker:
    """Says what it is told, and ``reason`` why it cannot reload."""

    def __init__(self, log: list[str], reason: str | None = None):
        self._log, self._reason = log, reason

    def suspend(self, reason: str) -> None:
        self._log.append("suspend")

    def resume(self) -> None:
        self._log.append("resume")

    def retire(self, reason: str) -> None:
        self._log.append(f"retire: {reason}")

    def drain(self) -> None:
        self._log.append("drain")

    def reload(self) -> str | None:
        self._log.append("reload")
        return self._reason


class Engine:
    """A rank whose other ranks say ``others`` at each agreement, in turn; all the same as it when there is no more."""

    def __init__(self, reason: str | None = None, *others: list[int]):
        self.log: list[str] = []
        self._others = list(others)
        tree = AgentStateRadixCache.__new__(AgentStateRadixCache)
        tree.agentstate = Linker(self.log, reason)
        tree.linker = _LinkerWrapper.__new__(_LinkerWrapper)
        tree.linker.cache_linker = tree.agentstate
        tree.linker.cache = SimpleNamespace(_all_reduce_attn_groups=self._agree)
        arguments = SimpleNamespace(enable_memory_saver=True, enable_weights_cpu_backup=False)
        self.updater = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=tree, server_args=arguments))

    def _agree(self, tensor: torch.Tensor, op: Any) -> None:
        if self._others:
            tensor.copy_(torch.minimum(tensor, torch.tensor(self._others.pop(0), dtype=tensor.dtype)))

    def update(self, result: Any, **fields: Any) -> list[str]:
        def original(updater: Any, request: Any) -> Any:
            self.log.append("update")
            if isinstance(result, BaseException):
                raise result
            return result

        assert plugin._around_update_from_disk(original, self.updater, request(**fields)) is result
        return [step.partition(":")[0] for step in self.log]


SUCCEEDED, WRONG_PATH = output(True), output(False, "Failed to get weights iterator: no such directory.")
HALF_WAY = output(False, "Failed to update weights: x.\nRolling back to original weights.")


@pytest.mark.parametrize(("others", "steps"), [([[1], [0, 0]], "retire"), ([[1], [0, 1], [0]], "reload retire")])
def test_what_a_dp_rank_doubts_that_shares_the_weights_all_doubt(
    monkeypatch: pytest.MonkeyPatch, others: list[list[int]], steps: str
) -> None:
    def agree(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert group == "of the model"
        tensor.copy_(torch.minimum(tensor, torch.tensor(others.pop(0), dtype=tensor.dtype)))

    monkeypatch.setattr(radix_cache, "model_group", lambda: "of the model")
    monkeypatch.setattr(torch.distributed, "all_reduce", agree)
    assert Engine().update(SUCCEEDED) == ["suspend", "update", *steps.split()]
    assert not others


def test_an_update_that_touches_no_weights_costs_nothing() -> None:
    assert Engine().update(WRONG_PATH) == ["suspend", "update", "resume"]


def test_after_weights_of_other_files_their_store_is_opened() -> None:
    assert Engine().update(SUCCEEDED) == ["suspend", "update", "reload", "resume"]


@pytest.mark.parametrize(
    ("engine", "result", "fields", "steps"),
    [
        (Engine(), HALF_WAY, {}, ["suspend", "update", "retire"]),
        (Engine(), SUCCEEDED, {"flush_cache": False}, ["suspend", "update", "retire"]),
        (Engine("its files differ"), SUCCEEDED, {}, ["suspend", "update", "reload", "retire"]),
        # What another rank doubts, whether its update failed or its store could not be opened.
        (Engine(None, [1], [0, 0]), WRONG_PATH, {}, ["suspend", "update", "retire"]),
        (Engine(None, [1], [1, 0]), SUCCEEDED, {}, ["suspend", "update", "retire"]),
        (Engine(None, [1], [0, 1], [0]), SUCCEEDED, {}, ["suspend", "update", "reload", "retire"]),
    ],
    ids=["half-way", "not flushed", "not reloaded", "another rank's failure", "mixed", "another rank's store"],
)
def test_what_is_in_doubt_on_one_rank_stays_closed_on_all(
    engine: Engine, result: Any, fields: dict[str, Any], steps: list[str]
) -> None:
    assert engine.update(result, **fields) == steps
    assert engine.log[-1].endswith("; restart it to store pages again")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One whose weights are not all there."""
    header = b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))
    return tmp_path


@pytest.mark.parametrize("here", [True, False], ids=["this rank", "another rank"])
def test_files_that_are_not_all_there_are_not_loaded(
    checkpoint: Path, here: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(None, *([] if here else [[0]]))
    answer = plugin._around_update_from_disk(
        lambda *given: engine.log.append("update"),
        engine.updater,
        UpdateWeightFromDiskReqInput(model_path=str(checkpoint if here else "new")),
    )
    assert engine.log == [], "neither is a tensor loaded nor the store closed"
    assert not answer.success
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert line == f"agentstate: weights are not updated. {answer.message}"
    why = f"{checkpoint / 'model.safetensors'} ends 1 bytes too early" if here else "another rank"
    assert answer.message.startswith(f"Nothing was loaded: {why}")


def test_files_that_sglang_does_not_read_as_they_are_are_its_own_affair(checkpoint: Path) -> None:
    assert damage(request()) is None
    assert damage(UpdateWeightFromDiskReqInput(model_path=str(checkpoint), load_format="dummy")) is None
    assert damage(UpdateWeightFromDiskReqInput(model_path=str(checkpoint), load_format="auto")) is not None
    (checkpoint / "model.safetensors").rename(checkpoint / "model.bin")
    assert damage(UpdateWeightFromDiskReqInput(model_path=str(checkpoint))) is None


def test_an_update_that_raises_leaves_the_weights_in_doubt() -> None:
    engine = Engine()
    with pytest.raises(RuntimeError, match="from the test"):
        engine.update(RuntimeError("from the test"))
    assert [step.partition(":")[0] for step in engine.log] == ["suspend", "update", "retire"]


@pytest.mark.parametrize(("source", "retires"), [("disk", 0), ("distributed", 1), ("tensor", 1), ("ipc", 1)])
def test_weights_that_come_from_elsewhere_than_files_end_the_storing(source: str, retires: int) -> None:
    engine = Engine()
    assert plugin._before_weight_load(lambda *given: given, engine.updater, source) == (engine.updater, source)
    assert len([step for step in engine.log if step.startswith("retire")]) == retires


def test_a_session_of_weight_updates_ends_the_storing_before_it_begins() -> None:
    engine = Engine()
    plugin._before_weight_session(lambda *given: engine.log.append("begun"), engine.updater, "request")
    assert [step.partition(":")[0] for step in engine.log] == ["retire", "begun"]


def test_memory_of_weights_that_is_released_ends_the_storing() -> None:
    engine = Engine()
    release = lambda updater, request: engine.log.append("released")  # noqa: E731
    plugin._before_memory_release(release, engine.updater, SimpleNamespace(tags=["kv_cache"]))
    assert engine.log == ["drain", "released"]
    plugin._before_memory_release(release, engine.updater, SimpleNamespace(tags=None))
    assert [step.partition(":")[0] for step in engine.log[2:]] == ["retire", "drain", "released"]


class Sessions:
    def __init__(self) -> None:
        self.device = "the tree"
        self.erases = True
        self.closed = False

    def stop_erasing(self) -> bool:
        self.erases = False
        return True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank of weights "aa", whose files say what ``loaded`` is now."""
    loaded = SimpleNamespace(mark=b"\xaa" * 32, shape="shape", reason=None, moved=True, error=None)
    one = Rank.__new__(Rank)
    one.off = one._suspended = None
    one.page_size, one._server_args, one._device_pools, one._shape = 64, None, [], "shape"
    one._engine = identity.Engine("e", "n", 0, "", "", "m", loaded.mark.hex(), "")
    one.sessions = Sessions()
    one._database = SimpleNamespace(write=lambda: nullcontext("connection"))
    loaded.registered = []
    monkeypatch.setattr(rank.engines, "register", lambda connection, engine: loaded.registered.append(engine))

    def move(open_store: Any, within_s: float) -> bool:
        # What SQL asks to erase is of the pages before.
        assert not one.sessions.erases
        if loaded.error is not None:
            raise loaded.error
        return bool(loaded.moved)

    one.pools = SimpleNamespace(move=move, describe=lambda: "")
    monkeypatch.setattr(one, "_opening", lambda marks, space: None, raising=False)
    monkeypatch.setattr(one, "_identity", lambda: ({PoolName.KV: loaded.mark}, "room"), raising=False)
    monkeypatch.setattr(one, "_open_sessions", Sessions, raising=False)
    monkeypatch.setattr(rank.identity, "shape", lambda: loaded.shape)
    monkeypatch.setattr(rank.identity, "in_the_way", lambda before, now: loaded.reason)
    return SimpleNamespace(rank=one, loaded=loaded)


def test_a_suspension_ends_and_a_retirement_does_not(one: Any) -> None:
    rank = one.rank
    rank.suspend("weights")
    assert rank.off == "weights"
    rank.resume()
    assert rank.off is None
    rank.suspend("weights")
    rank.retire("for good")
    rank.resume()
    rank.suspend("weights again")
    rank.resume()
    rank.retire("a second reason")
    assert rank.off == "for good"


def test_a_rank_goes_over_to_the_pages_of_its_new_weights_and_is_registered_anew(one: Any) -> None:
    before = one.rank.sessions
    one.loaded.mark = b"\xbb" * 32
    assert one.rank.reload() is None
    assert before.closed and not one.rank.sessions.closed
    assert one.rank.sessions.device == "the tree"
    assert one.rank._engine.fingerprint == (b"\xbb" * 32).hex()
    assert one.loaded.registered == [one.rank._engine]


def test_the_same_files_again_change_nothing(one: Any) -> None:
    before = one.rank.sessions
    assert one.rank.reload() is None
    assert one.rank.sessions is before and not before.closed


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"reason": "it is quantized"}, "it is quantized"),
        ({"moved": False}, "its drive did not answer"),
        ({"error": PageStoreLocked("another engine has it")}, "another engine has it"),
    ],
    ids=["reason", "drive", "locked"],
)
def test_a_rank_that_cannot_go_over_says_why(one: Any, what: dict[str, Any], said: str) -> None:
    one.loaded.mark = b"\xbb" * 32
    vars(one.loaded).update(what)
    assert said in one.rank.reload()
    assert one.rank._engine.fingerprint == (b"\xaa" * 32).hex()
    assert not one.rank.sessions.closed


@pytest.fixture
def in_the_way(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    def ask(now: identity.Shape, **model: Any) -> str | None:
        given = {"model_path": "new", "quantization": None, "load_format": "auto", "speculative_algorithm": None}
        loaded = SimpleNamespace(**given | {"enable_lora": False} | model)
        monkeypatch.setattr(identity, "get_model", lambda: loaded)
        monkeypatch.setattr(identity, "get_spec", lambda: loaded)
        monkeypatch.setattr(identity, "get_lora", lambda: loaded)
        return identity.in_the_way(identity.Shape({"config.json": b"{}"}, frozenset("ab")), now)

    return ask


def test_only_weights_that_make_the_model_what_a_start_makes_it_go_on(in_the_way: Any, tmp_path: Path) -> None:
    alike = identity.Shape({"config.json": b"{}"}, frozenset("ab"))
    assert in_the_way(alike) is None
    assert in_the_way(alike, load_format=None) is None
    assert "quantized" in in_the_way(alike, quantization="fp8")
    assert "load format" in in_the_way(alike, load_format="remote")
    assert "the draft model's" in in_the_way(alike, speculative_algorithm="EAGLE")
    assert in_the_way(alike, speculative_algorithm="NGRAM") is None
    assert "below those of adapters" in in_the_way(alike, enable_lora=True)
    for other in (
        identity.Shape({"config.json": b"{ }"}, frozenset("ab")),
        identity.Shape({"config.json": b"{}"}, frozenset("a")),
        identity.Shape({"config.json": b"{}"}, frozenset()),
    ):
        assert "another configuration or other tensors" in in_the_way(other)


def test_a_checkpoint_that_cannot_even_be_looked_for_is_told_like_one_that_is_damaged() -> None:
    assert damage(SimpleNamespace(model_path="a" * 300, load_format=None))

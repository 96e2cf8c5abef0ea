"""Adapters are named by what was loaded."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch import adapters, plugin
from engine_patch import sglang_api as sgl
from engine_patch.adapters import Adapters, apart
from engine_patch.cpu.unpinned import Unpinned
from engine_patch.radix_cache import AgentStateRadixCache

QKV, OUT = "model.layers.0.self_attn.qkv_proj.lora_A.weight", "model.layers.0.self_attn.o_proj.lora_A.weight"


def adapter(**changed: Any) -> Any:
    """What SGLang makes of an adapter's files."""
    given = {"r": 8, "values": 1.0, "last": 0.0, "dtype": torch.float32, "name": OUT, **changed}
    weights = {QKV: torch.full((8, 16), 2.0), given["name"]: torch.full((8, 16), given["values"], dtype=given["dtype"])}
    weights[given["name"]][-1, -1] = given["values"] + given["last"]
    config = SimpleNamespace(hf_config={"r": given["r"], "target_modules": ["q_proj", "o_proj"]})
    layers = [SimpleNamespace(weights=weights)]
    return SimpleNamespace(config=config, layers=layers, embedding_layers={}, added_tokens_embeddings={})


class Rank:
    """A rank's adapters, and what SGLang knows of them."""

    def __init__(self, modules: tuple[str, ...] = ("qkv_proj", "o_proj")):
        self.adapters = Adapters()
        self.manager = SimpleNamespace(loras={}, lora_refs={}, target_modules=set(modules))
        self.names: dict[str, str] = {}
        self.lora_names = SimpleNamespace(register=self._register)
        self.least_on_ranks: Any = lambda tensor: None
        self.backend: str | None = None

    def disaggregate(self, mode: str) -> None:
        pass

    def _register(self, *, lora_id: str, lora_name: str) -> None:
        self.names[lora_id] = lora_name

    def load(self, lora_id: str, loaded: Any) -> None:
        self.adapters.take(lora_id, loaded)
        self.manager.loras[lora_id] = loaded
        self.manager.lora_refs[lora_id] = SimpleNamespace(lora_name=f"name of {lora_id}")

    def agree(self, *lora_ids: str) -> None:
        self.adapters.agree(self.manager, lora_ids, self)

    def key(self, lora_id: str | None, extra_key: str | None = None) -> str | None:
        """Of a request, as SGLang makes it."""
        joined = extra_key if lora_id is None else (extra_key or "") + lora_id
        req = SimpleNamespace(lora_id=lora_id, extra_key=joined)
        self.adapters.name(req)
        return req.extra_key


def key(loaded: Any, **of_rank: Any) -> str:
    """That of a request with this adapter."""
    rank = Rank(**of_rank)
    rank.load("an id", loaded)
    rank.agree("an id")
    found = rank.key("an id")
    assert found is not None
    return found


def test_an_adapter_is_known_by_its_weights() -> None:
    rank = Rank()
    for lora_id in ("one", "two"):
        rank.load(lora_id, adapter())
    rank.load("three", adapter(last=1e-3))
    rank.agree("one", "two", "three")
    keys = {lora_id: rank.key(lora_id) for lora_id in ("one", "two", "three")}
    assert keys["one"] == keys["two"] == key(adapter())
    assert keys["three"] not in (keys["one"], None)
    assert "one" not in str(keys["one"])


def test_whatever_changes_what_is_computed_changes_the_key() -> None:
    further = [{"r": 16}, {"values": 2.0}, {"last": 1e-6}, {"dtype": torch.bfloat16}, {"name": OUT.replace("A", "B")}]
    keys = [key(adapter(**changed)) for changed in ({}, *further)]
    # SGLang applies what of an adapter is among the modules that it adapts.
    keys.append(key(adapter(), modules=("qkv_proj",)))
    assert len(set(keys)) == len(keys)
    assert key(adapter(), modules=("qkv_proj", "o_proj", "down_proj")) == keys[0]


def test_an_adapter_stays_what_was_loaded_when_its_file_is_written_over() -> None:
    file = torch.full((8, 16), 3.0)
    loaded = adapter()
    loaded.layers[0].weights[OUT] = file[:]
    found = key(loaded)
    file.fill_(4.0)
    assert loaded.layers[0].weights[OUT].eq(3.0).all()
    assert key(loaded) == found


def test_ranks_that_have_loaded_different_weights_agree_on_a_key_that_is_never_found_again() -> None:
    def loaded(others: Any) -> tuple[str | None, str | None]:
        """The keys of two ranks, of which the other one has loaded ``others``."""
        ranks, sent, both = (Rank(), Rank()), [], threading.Barrier(2)

        def least(tensor: torch.Tensor) -> None:
            sent.append(tensor.clone())
            both.wait(60)
            tensor.copy_(torch.minimum(*sent))

        for rank, of_rank in zip(ranks, (adapter(), others), strict=True):
            rank.least_on_ranks = least
            if of_rank is not None:
                rank.load("x", of_rank)
        with ThreadPoolExecutor() as together:
            list(together.map(lambda rank: rank.agree("x"), ranks))
        return ranks[0].key("x"), ranks[1].key("x")

    alike = loaded(adapter())
    assert alike[0] == alike[1] == key(adapter())
    mixed = [loaded(adapter(values=5.0)) for _ in range(2)]
    assert all(one == two for one, two in mixed)
    assert len({mixed[0][0], mixed[1][0], key(adapter()), key(adapter(values=5.0))}) == 4
    # One that was loaded on one rank only is unloaded by SGLang.
    assert loaded(None)[0] != key(adapter())


def test_no_client_can_send_the_key_of_an_adapter() -> None:
    rank = Rank()
    rank.load("x", adapter())
    rank.agree("x")
    own = rank.key("x")
    assert own is not None
    sent = [None, "", "tenant", own, own + "\0", own + "\0\0", f"tenant{own}", own[:-1], own + "|"]
    keys = [rank.key(lora_id, extra_key) for lora_id in (None, "x") for extra_key in sent]
    # An empty one is none.
    same = {"x": 2, None: 1}
    assert len(set(keys)) == 2 * len(sent) - same["x"] + same[None]
    assert keys[:3] == [None, "", "tenant"]
    assert rank.key("x", "tenant") == f"tenant{own}"


def test_keys_are_apart_however_they_are_put_together() -> None:
    parts = ["", "a", "\0", "|adapter:" + "0" * 64, "|adapter:" + "f" * 64]
    sent = {"".join(pieces) for length in range(4) for pieces in itertools.product(parts, repeat=length)}
    assert len({apart(one) for one in sent}) == len(sent)
    assert not {apart(one) for one in sent} & {one + part for one in sent for part in parts[3:]}


def test_an_engine_without_agentstate_keeps_sglangs_keys() -> None:
    rank = Rank()
    own = key(adapter())
    assert rank.key("x", "tenant") == "tenantx"
    assert rank.key(None, own) == own
    rank.adapters.agree(None, [], rank)
    assert rank.key(None, own) == own + "\0"


def test_an_adapter_that_is_unloaded_is_forgotten() -> None:
    rank = Rank()
    for lora_id in ("one", "two"):
        rank.load(lora_id, adapter())
        rank.agree(lora_id)
    assert rank.names == {str(rank.key("one"))[-32:]: "name of two"}
    del rank.manager.loras["one"]
    rank.agree("three")
    assert list(rank.adapters._digests) == ["two"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_tensors_of_any_type_are_digested(dtype: torch.dtype) -> None:
    assert key(adapter(dtype=dtype)) != key(adapter())


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """The adapters of a process in which SGLang runs with AgentState."""
    rank = Rank()
    rank.backend = "agentstate"
    monkeypatch.setattr(adapters, "LOADED", rank.adapters)
    monkeypatch.setattr(sgl, "get_memory", lambda: SimpleNamespace(radix_cache_backend=rank.backend))
    return rank


def test_sglang_loads_nothing_past_it(process: Rank) -> None:
    cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
    cache._params = SimpleNamespace(kv_event_lora_names=process.lora_names)
    cache._all_reduce_attn_groups = lambda tensor, op: None
    runner = SimpleNamespace(lora_manager=process.manager)
    scheduler = SimpleNamespace(tree_cache=cache, tp_worker=SimpleNamespace(model_runner=runner))

    def loading(lora_id: str, last: float) -> Any:
        """What SGLang does for a request to load an adapter."""

        def load(scheduler: Any, request: Any) -> str:
            loaded = adapter()
            loaded.uid = lora_id
            plugin._around_adapter(lambda it: it.layers[0].weights[OUT][0].fill_(last), loaded)
            process.manager.loras[lora_id] = loaded
            process.manager.lora_refs[lora_id] = SimpleNamespace(lora_name="its name")
            return "loaded"

        return load

    for number, hook in enumerate((plugin._around_adapter_load, plugin._around_adapter_load_of_tensors)):
        request = SimpleNamespace(lora_id=f"id {number}")
        assert hook(loading(request.lora_id, number + 5.0), scheduler, request) == "loaded"
    keys = {process.key(f"id {number}") for number in range(2)}
    assert len(keys) == 2
    assert {str(one)[-32:]: "its name" for one in keys} == process.names
    # It is what SGLang has made of the files.
    other = adapter()
    other.layers[0].weights[OUT][0].fill_(5.0)
    assert key(other) in keys

    class Req:
        def __init__(self, lora_id: str | None, extra_key: str | None):
            self.lora_id, self.extra_key = lora_id, extra_key

    req = Req.__new__(Req)
    plugin._around_new_request(Req.__init__, req, "id 0", extra_key="tenantid 0")
    assert str(req.extra_key).startswith("tenant|adapter:")


def test_an_engine_with_another_cache_copies_nothing(process: Rank) -> None:
    process.backend = None
    loaded = adapter()
    loaded.uid, before = "x", loaded.layers[0].weights[OUT]
    plugin._around_adapter(lambda it: None, loaded)
    assert loaded.layers[0].weights[OUT] is before
    plugin._agree_on_adapters(SimpleNamespace(tree_cache=object()), ["x"])
    assert process.key("x", "tenant") == "tenantx"


def test_adapters_that_an_engine_starts_with_are_named_before_its_first_request(
    process: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.load("x", adapter())
    memory = SimpleNamespace(enable_unified_cache_external_linker=True)
    monkeypatch.setattr(sgl, "get_memory", lambda: memory)
    monkeypatch.setattr(sgl, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))
    monkeypatch.setattr(sgl, "create_cache", lambda *_: process)
    for manager, found in ((None, "x"), (process.manager, key(adapter()))):
        runner = SimpleNamespace(lora_manager=manager)
        assert plugin._create_cache(SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))) is process
        assert process.key("x") == found


def test_a_cpu_pins_no_memory() -> None:
    unpinned = Unpinned()
    assert unpinned.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
    assert unpinned.zeros((2,), dtype=torch.int32, pin_memory=True).dtype is torch.int32
    assert unpinned.Tensor is torch.Tensor

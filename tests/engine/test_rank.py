"""A rank that is opened as SGLang opens it: what its stores share, what it evicts first, and what SQL is told of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from contents import MLA, keys, write
from sglang.srt.server_args import ServerArgs
from test_catalog import until
from test_pools import FULL, PAGE_SIZE, SWA, allocator_of, mla, sliding
from turns import begin

from agentstate.fleet import engines, manifests, pins, quotas
from agentstate.fleet.control import ControlClient
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.quotas import Quota
from agentstate.lookahead.forecast import Forecast
from agentstate.pages import PageKeys, PageStore, StoreView, fingerprint
from agentstate.pages.node import node_id
from agentstate.pages.wear import Wear, file_of
from agentstate.sql.database import Database
from agentstate.sql.models import leases
from agentstate.tiers import DirectoryTier, Policy, Range, Reading
from agentstate.tiers.pages import Listed
from engine_patch import identity, rank
from engine_patch.rank import Rank

Open = Callable[..., Rank]
WAIT_S = 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "pages"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "home").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'home' / 'agentstate.db'}")
    database.upgrade()
    yield database
    database.close()


@pytest.fixture
def opened(tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """A rank with full attention and a sliding window, or with ``kv``, whose settings are given by their names."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    arguments = ServerArgs(model_path=str(checkpoint))
    parallel = SimpleNamespace(pp_size=1, dp_rank=None, dp_size=1, attn_dp_rank=0, attn_dp_size=1)
    for module, names in (
        (identity, ("get_disagg", "get_model", "get_serving", "get_spec", "get_parallel")),
        (rank, ("get_parallel",)),
    ):
        for name in names:
            of = parallel if name == "get_parallel" else arguments
            monkeypatch.setattr(module, name, lambda of=of: of)
    monkeypatch.setattr(rank, "get_observability", lambda: SimpleNamespace(enable_metrics=False))
    monkeypatch.setenv("AGENTSTATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTSTATE_HEARTBEAT_INTERVAL_S", "0.02")
    for name in ("STAGING_BYTES", "SPILL_STAGING_BYTES"):
        monkeypatch.setenv(f"AGENTSTATE_{name}", str(1 << 20))
    running: list[Rank] = []

    def open(kv: Any = None, rank: int = 0, ranks: int = 1, dp: Mapping[str, int] = {}, **settings: Any) -> Rank:
        parallel.attn_tp_rank, parallel.attn_tp_size, parallel.tp_size = rank, ranks, ranks
        vars(parallel).update(dp)
        for name, value in settings.items():
            monkeypatch.setenv(f"AGENTSTATE_{name.upper()}", str(value))
        params = SimpleNamespace(
            page_size=PAGE_SIZE,
            token_to_kv_pool_allocator=allocator_of(kv or sliding()),
            req_to_token_pool=None,
            swa_gates_prefix_match=True,
            mtp_draft_device_pools=(),
            mtp_draft_mamba_pools=(),
            sidecar_draft_device_pools=(),
            swa_retain_window=2 * PAGE_SIZE,
        )
        running.append(Rank(arguments, params, {FULL} if kv else {FULL, SWA}))
        return running[-1]

    yield open
    for one in running:
        one.close()


def stores(one: Rank) -> list[PageStore]:
    return [pool.store for pool in one.pools._pools]


def test_the_pools_of_a_rank_have_one_quota_and_one_order(opened: Open) -> None:
    full, window = stores(opened())
    room = 8 * full.draft_bytes(1) + full.draft_bytes(1) // 2
    full.quota = full.quota._replace(max_bytes=room, free_fraction=0.0)
    assert window.quota == full.quota
    for page in range(8):
        write(full, keys(page))
    assert full.stats.pages == 8, "one of them may have all of it"
    write(window, keys(0))
    assert (full.stats.pages_evicted, window.stats.pages) == (1, 1), "and gives way to the other"


def test_owners_have_limits_over_all_pools_and_stat_says_what_they_have(opened: Open) -> None:
    one = opened()
    full, window = stores(one)
    each, of_window = full.draft_bytes(1, "tenant a"), window.draft_bytes(1, "tenant a")
    limits = {"tenant a": 2 * each + of_window, "": each}
    one.limit_owners(limits)
    for page in range(3):
        write(full, keys(page), owner="tenant a")
        write(full, keys((page, "b")), owner="tenant b")
        write(full, keys((page, "none")))
    write(window, keys(0), owner="tenant a")
    assert full.stored(keys(0, 1, 2)) == [False, True, True]
    assert all(full.stored(keys((0, "b"), (1, "b"), (2, "b"))))
    assert full.stored(keys((0, "none"), (1, "none"), (2, "none"))) == [False, False, True]
    stat = one.stat()
    assert "--model-path" in {given["flag"].split()[0] for given in stat["flags"]}
    assert stat["owners"] == {"tenant b": 3 * each, "tenant a": 2 * each + of_window, "none": each}
    assert (stat["others"], stat["others_bytes"]) == (0, 0)
    one.limit_owners({})
    write(full, keys(0), owner="tenant a")
    assert all(full.stored(keys(0, 1, 2)))


def test_a_rank_says_what_it_has_written_in_a_day_and_notes_it(opened: Open, root: Path) -> None:
    one = opened(writes_per_day=1 << 30)
    full, window = stores(one)
    write(full, keys(0))
    write(window, keys(0))
    written = full.draft_bytes(1) + window.draft_bytes(1)
    assert one.stat()["wear"] == {"bytes_day": written, "budget": 1 << 30}
    full.wear.save()
    assert Wear(file_of(root, 0)).bytes_written == written


def test_what_other_engines_left_goes_first_and_their_manifests_with_it(
    opened: Open, root: Path, database: Database
) -> None:
    mark = fingerprint(model="another")
    left = PageStore(root / mark.hex()[:32] / "rank0", mark, MLA)
    write(left, keys(1, 2))
    left.close()
    of_left = Manifest("s", mark.hex(), 0, node_id(root), "eng", 4, 8, b"".join(keys(1, 2)), 1)
    with database.write() as connection:
        manifests.save(connection, of_left)
    opened(pages_quota=1)
    assert not left.directory.exists()

    def gone() -> bool:
        with database.read() as connection:
            return manifests.load(connection, "s", mark.hex(), 0, of_left.node) is None

    until(gone)


def test_sql_knows_a_rank_by_its_directory_and_how_to_ask_it(
    opened: Open, root: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened()

    def registered() -> list[engines.Engine]:
        with database.read() as connection:
            return engines.registered(connection)

    until(lambda: bool(registered()))
    (engine,) = registered()
    assert engine.node == (root / "node").read_text().strip() == node_id(root)
    stat = ControlClient(engine.control_address, engine.control_secret).call("stat", 60)
    assert (stat["engine"], stat["fingerprint"]) == (engine.id, one._engine.fingerprint)
    assert [store.directory.parents[1] for store in stores(one)] == [root, root]


def test_a_prefetch_is_due_when_it_was_said_to_be(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    one = opened()
    monkeypatch.setattr(one.sessions, "prefetch", lambda *given, **named: asked.append((*given, named)))
    one.prefetch("s", "host", b"", 2.5)
    assert asked == [("s", "host", b"", 2.5, {})]


def test_a_rank_takes_forecasts_of_sessions_that_it_has_served(opened: Open) -> None:
    one, soon = opened(), Forecast.exactly(5.0).pack()
    assert one.foresee("s", soon, 0.0, "tool") == {"state": "ignored"}
    one.waits.began("s")
    assert one.foresee("s", soon, 0.0, "tool") == {"state": "accepted"}
    with pytest.raises(ValueError, match="packed forecast"):
        one.foresee("s", b"x", 0.0, "tool")
    assert one.demote("s")["state"] == "demoted"
    assert (one.waits.index("s"), one.release("s"), one.release("t")) == (
        0.0,
        {"state": "accepted"},
        {"state": "ignored"},
    )
    made = [(of["session"], of["decision"], of["outcome"]) for of in one.decisions(0)["decisions"]]
    releases = [("s", "release", "accepted")] * 2 + [("t", "release", "ignored")]
    assert made == [("s", "foresee", "ignored"), *releases]
    stat = one.stat()["foresight"]
    assert (stat["foreseen"], stat["ignored"]) == (1, 1)
    explained = one.explain("s")
    assert explained["tiers"] == {name: {"tokens": 0, "bytes": 0} for name in ("device", "disk", "host")}
    assert explained["account"]["name"] == "none"


def test_quotas_and_pins_come_from_sql_and_are_told(opened: Open, database: Database) -> None:
    url = "http://127.0.0.1:40000/v1"
    one = opened(host_bytes=1 << 20, engine_base_url=url)
    one.accounts.note("a", "tenant t")
    one.held_on_device = lambda: {"tenant t": 5, "": 3}
    begin(database, "a")
    with database.write() as connection:
        quotas.put(connection, "tenant t", Quota(device_bytes=7, nvme_bytes=9))
        pins.put(connection, "a", pins.PinTier.HOST, 3600.0)
        connection.execute(sa.update(leases).values(engine=url))
    until(lambda: one.waits.pinned("a") is not None and one.accounts.limit("tenant t", "device") == 7)
    of_t = {
        "device": {"bytes": 5, "limit": 7},
        "host": {"bytes": 0, "limit": None},
        "nvme": {"bytes": None, "limit": 9},
    }
    assert one.explain("a")["account"] == {"name": "tenant t", "tiers": of_t}
    assert one.stat()["accounts"] == {"tenant t": of_t, "none": one.stat()["accounts"]["none"]}
    assert one.stat()["pins"] == 1
    assert one.pin("b", "device", 60.0) == {"state": "accepted", "tier": "device", "pages": 0, "bytes": 0, "tokens": 0}
    with database.write() as connection:
        quotas.put(connection, "tenant t", Quota())
        pins.remove(connection, "a")
    until(lambda: one.waits.pinned("a") is None and one.accounts.limit("tenant t", "device") is None)
    assert one.waits.pinned("b") is not None


def test_a_rank_without_foresight_ignores_forecasts(opened: Open) -> None:
    one = opened(foresight=False)
    one.waits.began("s")
    assert one.foresee("s", Forecast.exactly(5.0).pack(), 0.0, "tool") == {"state": "ignored"}
    assert one.waits.foreseen == 0


def test_a_rank_closes_while_its_shared_store_hangs(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "share").mkdir()
    one = opened(shared_store=f"file://{tmp_path / 'share'}", drive_timeout_s=3600)
    tier = one._extents.tier
    # Longer than this test waits.
    tier._policy = Policy(timeout_s=3600)
    asked = threading.Event()

    class Hanging(DirectoryTier):
        def read(self, name: str, ranges: Sequence[Range]) -> Reading:
            asked.set()
            return Reading()

    tier._tier.close()
    tier._tier = Hanging(tmp_path / "share")
    full = one.pools._pools[0]
    name = f"{full.store.fingerprint.hex()}/rank0/aa/{'a' * 64}.ext"
    full.shared.pages.enter([Listed(1, name, full.store.draft_bytes(2) + 48, "", PageKeys.of(keys(1, 2)))])
    full.restorer.preload("a", keys(1, 2), torch.tensor([1, 2]))
    assert asked.wait(WAIT_S)
    closing = threading.Thread(target=one.close, daemon=True)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    monkeypatch.setattr(one, "close", lambda: None)


def test_the_first_of_ranks_that_hold_the_same_pages_writes_for_all(
    opened: Open, root: Path, database: Database
) -> None:
    first = opened(mla(), 0, 4, pages_quota=1000)
    second = opened(mla(), 1, 4)
    (own,), (seen,) = stores(first), stores(second)
    assert isinstance(own, PageStore) and own.quota.max_bytes == 1000, "nobody else needs room"
    assert isinstance(seen, StoreView)
    assert (seen.directory, seen.fingerprint, seen.geometry) == (own.directory, own.fingerprint, own.geometry)
    assert [path.name for path in root.glob("*/rank*")] == ["rank0"]

    def registered() -> list[engines.Engine]:
        with database.read() as connection:
            return sorted(engines.registered(connection), key=lambda engine: engine.rank)

    until(lambda: len(registered()) == 2)
    assert [(engine.rank, engine.fingerprint) for engine in registered()] == [
        (0, own.fingerprint.hex()),
        (1, own.fingerprint.hex()),
    ]
    each = own.draft_bytes(1, "tenant a")
    own.quota = own.quota._replace(max_bytes=None)
    first.limit_owners({"tenant a": 2 * each})
    for page in range(3):
        write(own, keys(page), owner="tenant a")
    assert own.stored(keys(0, 1, 2)) == [False, True, True], "nor what an owner may have"


@pytest.mark.parametrize(
    "of",
    [lambda number: {"dp_rank": number, "dp_size": 2}, lambda number: {"attn_dp_rank": number, "attn_dp_size": 2}],
    ids=["replicas", "attention"],
)
def test_a_dp_rank_has_a_root_of_its_own_with_pages_of_the_same_kind(
    opened: Open, root: Path, database: Database, of: Callable[[int], dict[str, int]]
) -> None:
    first, second = (opened(mla(), dp=of(number), pages_quota=1000, writes_per_day=100) for number in range(2))
    (own,), (other,) = stores(first), stores(second)
    assert own.fingerprint == other.fingerprint
    assert own.directory.relative_to(root) == other.directory.relative_to(root / "dp1")
    assert [store.quota.max_bytes for store in (own, other)] == [500, 500]
    assert [one.stat()["wear"]["budget"] for one in (first, second)] == [50, 50]
    assert node_id(root) != node_id(root / "dp1")

    def registered() -> list[engines.Engine]:
        with database.read() as connection:
            return sorted(engines.registered(connection), key=lambda engine: engine.dp_rank)

    until(lambda: len(registered()) == 2)
    assert [(one.node, one.rank, one.dp_rank, one.dp_size, one.pages_dir) for one in registered()] == [
        (node_id(root), 0, 0, 2, str(root)),
        (node_id(root / "dp1"), 0, 1, 2, str(root / "dp1")),
    ]


def test_what_dp_ranks_have_left_that_are_no_more_makes_room(opened: Open, root: Path) -> None:
    """The first of two looks after every second one, and leaves alone what is the other's."""
    mark = fingerprint(model="another")
    for left in ("dp1", "dp2", "dp3", "dp4"):
        store = PageStore(root / left / mark.hex()[:32] / "rank0", mark, MLA)
        write(store, keys(1))
        store.close()
    opened(dp={"dp_rank": 0, "dp_size": 2}, pages_quota=1)
    assert sorted(path.parents[2].name for path in root.glob("dp*/*/rank0/extents")) == ["dp1", "dp3"]


def test_ranks_that_hold_different_pages_write_their_own(opened: Open, root: Path) -> None:
    of_ranks = [stores(opened(None, rank, 2, pages_quota=1000)) for rank in range(2)]
    assert all(isinstance(store, PageStore) and store.quota.max_bytes == 500 for of in of_ranks for store in of)
    assert len({store.fingerprint for of in of_ranks for store in of}) == 4
    assert sorted(path.name for path in root.glob("*/rank*")) == ["rank0", "rank0", "rank1", "rank1"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_rank_has_stored_for_itself_before_goes_once_another_writes_for_it(
    opened: Open, root: Path, database: Database, there: bool
) -> None:
    kv = mla()
    writer = opened(kv, 0, 2)
    mark = identity.fingerprints(writer._server_args, PAGE_SIZE, writer._device_pools)[1][identity.PoolName.KV]
    (writers,) = stores(writer)
    before = root / mark.hex()[:32] / "rank1"
    if there:
        store = PageStore(before, mark, writers.geometry)
        write(store, keys(1, 2))
        store.close()
        (before / "unlike").touch()
        (before / "shared").mkdir()
        (before / "shared" / "data.mdb").write_bytes(b"an index of what is in a shared store")
    listed = [
        Manifest("s", of.hex(), rank, node_id(root), "eng", 4, 8, b"".join(keys(1, 2)), 1)
        for rank, of in ((0, writers.fingerprint), (1, mark))
    ]
    with database.write() as connection:
        for manifest in listed:
            manifests.save(connection, manifest)
    opened(kv, 1, 2)
    assert not before.exists() and writers.directory.exists()

    def saved() -> list[int]:
        with database.read() as connection:
            found = (manifests.load(connection, "s", of.fingerprint, of.rank, of.node) for of in listed)
            return [manifest.rank for manifest in found if manifest is not None]

    until(lambda: saved() == [0])

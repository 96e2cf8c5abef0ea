"""Extents of a local store, published, and what is refused of what comes back."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import places
import pytest

from agentstate.errors import BadExtent, MacMismatch, SettingsError, TierMissing, TierUnavailable, UnknownFormat
from agentstate.pages import Geometry, PageStore, Quota
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import read_header
from agentstate.pages.testing.pages import MARK, MHA, key, keys, write
from agentstate.settings import Settings
from agentstate.tiers import ExtentName, Guard, Published, SharedExtents, StoreKeys, extents, shared_extents, tier
from agentstate.tiers.mac import TRAILER_BYTES
from agentstate.tiers.testing.conformance import PATIENCE_S, names, read

OLD, NEW, OTHER = "an old key of at least 32 characters", "a new key of at least 32 characters", "k" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "pages", MARK, MHA)
    write(store, keys(1, 2, 3))
    yield store
    store.close()


@pytest.fixture
def path(store: PageStore) -> Path:
    (path,) = (store.directory / "extents").iterdir()
    return path


@pytest.fixture
def place() -> places.Objects:
    return places.in_memory()


def shared(place: places.Objects, keys: str | None = None) -> SharedExtents:
    return SharedExtents(place.open(), None if keys is None else StoreKeys(keys))


def publish(place: places.Objects, path: Path, keys: str | None = None) -> Published:
    return shared(place, keys).publish(path, "rank0").result(PATIENCE_S)


def header(place: places.Objects, published: Published, keys: str | None = None) -> ExtentHeader:
    return shared(place, keys).header(published.name, published.n_bytes).result(PATIENCE_S)


def test_an_extent_is_named_by_its_header_and_comes_back_with_every_byte(place: places.Objects, path: Path) -> None:
    published = publish(place, path)
    assert published.new and not publish(place, path).new
    found = header(place, published)
    local = read_header(path)
    assert found.keys.packed == local.keys.packed and found.layout == local.layout
    encoded = local.encode()
    assert published.name == str(ExtentName.of(bytes.fromhex(MARK.hex()), "rank0", encoded))
    assert published.name.endswith(f"/{hashlib.sha256(encoded).hexdigest()}.ext")
    assert read(place.open(), published.name, 0, published.n_bytes) == path.read_bytes()
    for layer in range(MHA.layers):
        components = []
        for component, n_bytes in enumerate(MHA.component_bytes):
            offset, length = found.layout.component_range(layer, component, 0, 3)
            data = read(place.open(), published.name, offset, length)
            components.append([np.frombuffer(data, np.uint8).reshape(3, n_bytes)])
        assert found.wrong_slots(layer, 0, components) == []


@pytest.mark.parametrize("keys_", [None, OLD])
def test_an_extent_is_coded_on_its_way_and_read_by_who_publishes_raw_ones(
    place: places.Objects, path: Path, keys_: str | None
) -> None:
    coding = SharedExtents(place.open(), None if keys_ is None else StoreKeys(keys_), "lossless")
    published = coding.publish(path, "rank0").result(PATIENCE_S)
    again = coding.publish(path, "rank0").result(PATIENCE_S)
    assert published.new and again == published._replace(new=False)
    assert published.n_bytes < path.stat().st_size and len(names(place.open())) == 1
    found, local = header(place, published, keys_), read_header(path)
    assert found.coding is not None and (found.keys, found.geometry) == (local.keys, local.geometry)
    assert published.n_bytes == found.file_bytes + (TRAILER_BYTES if keys_ else 0)
    data = read(place.open(), published.name, 0, published.n_bytes)
    for layer in range(MHA.layers):
        components = []
        for component, n_bytes in enumerate(MHA.component_bytes):
            offset, length = found.component_range(layer, component, 0, 3)
            rows = np.zeros((3, n_bytes), np.uint8)
            coded = np.frombuffer(data[offset : offset + length], np.uint8)
            found.coding.decode(layer, component, 0, n_bytes, coded, [rows])
            components.append([rows])
        assert local.wrong_slots(layer, 0, components) == []
    # The raw one is another object: both may be there.
    assert publish(place, path, keys_).new and len(names(place.open())) == 2


def test_what_coding_makes_no_smaller_is_published_as_it_is(place: places.Objects, tmp_path: Path) -> None:
    geometry = Geometry(layers=1, page_size=1, component_bytes=(4096,))
    store = PageStore(tmp_path / "noise", MARK, geometry)
    draft = store.draft(keys(1), mmap.mmap(-1, store.draft_bytes(1)))
    draft.component(0, 0)[:] = np.random.default_rng(0).integers(0, 256, (1, 4096), np.uint8)
    store.publish(draft)
    (noise,) = (store.directory / "extents").iterdir()
    published = SharedExtents(place.open(), codec="lossless").publish(noise, "rank0").result(PATIENCE_S)
    assert read(place.open(), published.name, 0, published.n_bytes) == noise.read_bytes()
    store.close()


def test_equal_extents_of_two_nodes_are_one_object(place: places.Objects, path: Path, tmp_path: Path) -> None:
    other = PageStore(tmp_path / "another node", MARK, MHA)
    write(other, keys(9))
    write(other, keys(1, 2, 3))
    (_, second) = sorted((other.directory / "extents").iterdir())
    assert publish(place, path, OLD).name == publish(place, second, OLD).name
    assert len(names(place.open())) == 1
    other.close()


def test_an_extent_is_published_whole_although_it_is_evicted_meanwhile(
    store: PageStore, place: places.Objects, path: Path
) -> None:
    """Its space is not overwritten before the tier has read it, whoever closed the file."""
    right = path.read_bytes()

    class Later(places.Objects):
        pass

    later = Later(place.store).open()
    begun: list[bool] = []
    real = type(later)._publish  # type: ignore[attr-defined]

    async def publish_later(self: object, name: str, source: object) -> bool:
        store.quota = Quota(max_bytes=store.stats.bytes)
        write(store, keys(4, 5, 6))
        begun.append(path.exists())
        return bool(await real(self, name, source))

    later._publish = publish_later.__get__(later)  # type: ignore[attr-defined]
    published = SharedExtents(later).publish(path, "rank0").result(PATIENCE_S)
    assert begun == [False] and key(1) not in store
    assert read(place.open(), published.name, 0, published.n_bytes) == right


def test_what_is_no_extent_is_not_published(place: places.Objects, path: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_bytes(b"no extent" * 10)
    with pytest.raises(BadExtent):
        shared(place).publish(notes, "rank0")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadExtent):
        shared(place).publish(path, "rank0")
    with pytest.raises(FileNotFoundError):
        shared(place).publish(tmp_path / "gone", "rank0")
    for shard in ("", "a/b", "..", "rank 0"):
        with pytest.raises((ValueError, BadExtent)):
            shared(place).publish(path, shard)
    assert names(place.open()) == []


@pytest.mark.parametrize("first_bytes", [4, 100, 1 << 16])
def test_a_header_that_is_longer_than_the_first_read_is_read_to_its_end(
    place: places.Objects, path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: int
) -> None:
    monkeypatch.setattr(extents, "_FIRST_BYTES", max(24, first_bytes))
    published = publish(place, path, OLD)
    assert header(place, published, OLD).keys.packed == read_header(path).keys.packed


# Keys


def test_with_a_key_an_extent_has_a_mac_behind_it_and_is_read_by_who_has_the_key_or_needs_none(
    place: places.Objects, path: Path
) -> None:
    published = publish(place, path, OLD)
    assert published.n_bytes == path.stat().st_size + TRAILER_BYTES
    for reader in (OLD, None, f"{NEW},{OLD}", f"{OLD},{NEW}"):
        assert header(place, published, reader).keys.packed == read_header(path).keys.packed
    for reader in (NEW, OTHER, f"{NEW},{OTHER}"):
        with pytest.raises(MacMismatch, match="not in AGENTSTATE_STORE_KEY"):
            header(place, published, reader)


def test_an_extent_without_a_mac_is_refused_by_who_has_a_key(place: places.Objects, path: Path) -> None:
    published = publish(place, path)
    with pytest.raises(MacMismatch, match="no MAC"):
        header(place, published, OLD)


def test_a_key_is_replaced_without_a_moment_in_which_nothing_is_read(place: places.Objects, path: Path) -> None:
    old = publish(place, path, OLD)
    between = f"{NEW},{OLD}"
    assert header(place, old, between).layout
    # Published again, it gets the new key's.
    assert publish(place, path, between).new
    assert header(place, old, NEW).layout


def test_a_header_is_not_looked_at_before_its_mac(
    place: places.Objects, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish(place, path, OLD)
    monkeypatch.setattr(ExtentHeader, "decode", lambda *_: pytest.fail("a header that nobody signed was decoded"))
    with pytest.raises(MacMismatch):
        header(place, published, NEW)


@pytest.mark.parametrize("keys", [None, OLD])
def test_no_bit_of_a_header_or_of_what_is_behind_can_be_changed(
    place: places.Objects, path: Path, keys: str | None
) -> None:
    published = publish(place, path, keys)
    right = path.read_bytes() + (StoreKeys(keys).trailer(read_header(path).encode()) if keys else b"")
    length = len(read_header(path).encode())
    places_ = list(range(0, length, 7)) + (list(range(len(right) - TRAILER_BYTES, len(right))) if keys else [])
    for at in places_:
        place.put(published.name, right[:at] + bytes([right[at] ^ 0x10]) + right[at + 1 :])
        with pytest.raises(BadExtent):
            header(place, published, keys)
    place.put(published.name, right)
    assert header(place, published, keys).layout


@pytest.mark.parametrize("keys_", [None, OLD])
def test_an_object_that_is_another_extent_is_refused(
    place: places.Objects, store: PageStore, path: Path, tmp_path: Path, keys_: str | None
) -> None:
    first = publish(place, path, keys_)
    elsewhere = PageStore(tmp_path / "other", MARK, MHA)
    write(elsewhere, keys(7, 8, 9))
    (second_path,) = (elsewhere.directory / "extents").iterdir()
    second = publish(place, second_path, keys_)
    swapped = read(place.open(), second.name, 0, second.n_bytes)
    place.put(first.name, swapped)
    with pytest.raises(BadExtent, match="another extent"):
        header(place, first, keys_)
    # In the folder of another fingerprint it is another extent too.
    moved = str(ExtentName.parse(second.name)._replace(fingerprint="ab" * 32))
    place.put(moved, swapped)
    with pytest.raises(BadExtent, match="another extent"):
        header(place, second._replace(name=moved), keys_)
    elsewhere.close()


@pytest.mark.parametrize("keys", [None, OLD])
@pytest.mark.parametrize("change", [-1, 1, TRAILER_BYTES, -TRAILER_BYTES, -5000, 4096])
def test_an_object_of_another_length_is_refused(
    place: places.Objects, path: Path, keys: str | None, change: int
) -> None:
    published = publish(place, path, keys)
    if keys is None and change == TRAILER_BYTES:
        return  # what is behind is not looked at without a key
    data = read(place.open(), published.name, 0, published.n_bytes)
    data = data + bytes(change) if change > 0 else data[:change]
    place.put(published.name, data)
    with pytest.raises(BadExtent):
        header(place, published._replace(n_bytes=len(data)), keys)
    if change < 0:
        with pytest.raises(TierMissing):
            header(place, published, keys)


def test_nothing_and_something_else_are_refused(place: places.Objects, path: Path) -> None:
    published = publish(place, path)
    for data in (b"", b"x", bytes(100), os.urandom(5000), b"AGSEXTNT" + b"\xff" * 5000):
        place.put(published.name, data)
        with pytest.raises(BadExtent) as error:
            header(place, published._replace(n_bytes=len(data)))
        assert not isinstance(error.value, UnknownFormat)


def test_cancelling_a_header_cancels_its_reads(place: places.Objects, path: Path) -> None:
    published = publish(place, path)
    one = shared(place)
    waiting = one.header(published.name, published.n_bytes)
    waiting.cancel()
    assert waiting.cancelled()
    one.tier.close()
    assert isinstance(one.header(published.name, published.n_bytes).exception(PATIENCE_S), TierUnavailable)


@pytest.mark.parametrize("keys", ["", "short", f"{OLD},", f"{OLD},{NEW},{OTHER}", f"{OLD},short"])
def test_keys_that_are_too_short_or_too_many_are_refused_and_not_shown(keys: str) -> None:
    with pytest.raises(SettingsError, match="AGENTSTATE_STORE_KEY") as error:
        StoreKeys(keys)
    assert OLD not in str(error.value) and "short" not in str(error.value)


# By URL and settings


def test_a_directory_is_opened_by_its_url(tmp_path: Path, path: Path) -> None:
    root = tmp_path / "a share"
    root.mkdir()
    url = f"file://{tmp_path}/a%20share"
    with tier(url) as opened:
        assert isinstance(opened, Guard)
        published = SharedExtents(opened).publish(path, "rank0").result(PATIENCE_S)
        assert (root / published.name).stat().st_size == published.n_bytes
    settings = Settings(shared_store=url, store_key=OLD)  # type: ignore[arg-type]
    one = shared_extents(settings)
    assert one is not None
    with pytest.raises(MacMismatch):
        one.header(published.name, published.n_bytes).result(PATIENCE_S)
    one.tier.close()
    assert shared_extents(Settings()) is None


@pytest.mark.parametrize(
    "url",
    [
        "/mnt/share",
        "file://mnt/share",
        "http://example.com/bucket",
        "s3://key:secret@bucket/prefix",
        "s3://bucket/prefix?region=x",
        "s3://",
        "nfs://host/share",
        "",
    ],
)
def test_a_url_of_another_kind_or_with_credentials_is_refused_and_they_are_not_shown(url: str) -> None:
    with pytest.raises(SettingsError) as error:
        tier(url)
    assert "secret" not in str(error.value)


def test_without_obstore_a_bucket_is_refused_and_a_directory_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(SettingsError, match=r"agentstate\[shared\]"):
        tier("s3://bucket/prefix")
    with tier(f"file://{tmp_path}") as opened:
        assert names(opened) == []

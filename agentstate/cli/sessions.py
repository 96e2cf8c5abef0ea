"""`agentstate sessions`: what a running service says of sessions, and does with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentstate.cli import loading
from agentstate.cli.output import (
    ApiKey,
    AsJson,
    Url,
    confirm,
    say,
    show_fields,
    show_json,
    show_line,
    show_rows,
    show_table,
    visible,
)
from agentstate.errors import RevisionStale, SettingsError

if TYPE_CHECKING:
    from agentstate.answers import Entry, Lease, Placement, Session
    from agentstate.client import Client
    from agentstate.client.events import Event

# How many of the newest decisions are shown.
_DECISIONS = 5
# Of a text in one line.
_SHOWN_CHARACTERS = 2000
_PAGE = 1000

app = loading.group()

SessionId = Annotated[str, typer.Argument(help="The session's id.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would go; change nothing.")]


@app.command("ls")
def list_sessions(
    limit: Annotated[int, typer.Option(min=1, help="The most to list.")] = 100,
    model: Annotated[str | None, typer.Option(help="Only sessions of this model.")] = None,
    status: Annotated[str | None, typer.Option(help="Only those that are idle, running or suspended.")] = None,
    oldest: Annotated[bool, typer.Option("--oldest", help="By id from the first on, not from the last.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="More columns.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the sessions that have not expired, the newest first, by id."""
    if status not in (None, "idle", "running", "suspended"):
        raise typer.BadParameter(f"{status}: idle, running or suspended", param_hint="--status")
    found: list[Session] = []
    with _client(url, api_key) as client:
        for session in _sessions(client, "asc" if oldest else "desc"):
            if model in (None, session.model) and status in (None, session.status):
                found.append(session)
            if len(found) == limit:
                break
    rows = [session.model_dump(mode="json") for session in found]
    if as_json:
        show_json(rows)
        return
    columns = ["id", "status", "model", "updated_at"]
    columns += ["created_at", "expires_at", "revision", "metadata"] if wide else []
    show_table(columns, [[_cell(name, row[name]) for name in columns] for row in rows])


@app.command("show")
def show_session(
    session_id: SessionId,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a session, without its entries."""
    with _client(url, api_key) as client:
        found = client.read(session_id).model_dump(mode="json")
    if as_json:
        show_json(found)
    else:
        show_fields({name: _cell(name, value) for name, value in found.items()})


@app.command("tail")
def tail_session(
    session_id: SessionId,
    last: Annotated[int, typer.Option("--last", "-n", min=0, max=_PAGE, help="How many entries to begin with.")] = 10,
    follow: Annotated[bool, typer.Option(help="Go on with what happens, until the session ends.")] = True,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object a line.")] = False,
) -> None:
    """Show a session's newest entries, and follow it: entries, changes of its state, and rewinds."""
    with _client(url, api_key) as client:
        newest = client.entries(session_id, limit=max(last, 1), order="desc").data
        for entry in reversed(newest[:last]):
            _print_event(entry, as_json)
        if follow:
            for event in client.events(session_id, after=newest[0].seq if newest else 0):
                _print_event(event, as_json)


@app.command("export")
def export_session(
    session_id: SessionId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new file, instead of standard output.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Write a session as JSON lines: what it is, then an entry a line. KV, times and ids of entries are left out: the
    export of what was imported is the same bytes."""
    from agentstate.private import private

    with _client(url, api_key) as client:
        if output is None:
            sys.stdout.writelines(_exported(client, session_id))
            return
        try:
            file = open(output, "x", encoding="ascii", opener=private)  # noqa: SIM115
        except FileExistsError:
            raise SettingsError(f"{output} is there already: name a new file") from None
        try:
            with file:
                file.writelines(_exported(client, session_id))
        except BaseException:
            output.unlink()
            raise


@app.command("import")
def import_session(
    file: Annotated[Path, typer.Argument(help="What `export` has written; - for standard input.")],
    own_id: Annotated[str | None, typer.Option("--id", help="Another id than the exported one.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Make a session of an export, whole or not at all. It is recomputed when it is resumed. Prints its id."""
    about, entries = _imported(file)
    with _client(url, api_key) as client:
        options = {name: about[name] for name in ("metadata", "cache_salt", "extra_key")}
        session = client.create_session(about["model"], id=own_id or about["id"], **options)
        try:
            _append(client, session.id, entries)
        except BaseException:
            client.delete(session.id, revision="*")
            raise
    print(visible(session.id))


@app.command("rm")
def remove_sessions(
    session_ids: Annotated[list[str], typer.Argument(help="The sessions' ids.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete sessions: their transcripts, and their KV on all tiers. Lists what goes, and asks. Forks keep what they
    share with them."""
    with _client(url, api_key) as client:
        found = {id: client.read(id) for id in dict.fromkeys(session_ids)}
        rows = [_doomed(client, session) for session in found.values()]
        if not as_json:
            show_rows(rows, as_json=False)
        if not dry_run:
            confirm(f"Delete {len(found)} sessions, for good?", yes=yes)
            for session in found.values():
                # What has changed since it was listed stays.
                client.delete(session.id, revision=session.revision)
    if as_json:
        show_json({"dry_run": dry_run, "sessions": rows})
    else:
        say(f"{len(found)} sessions {'would be deleted' if dry_run else 'deleted: engines erase their KV'}")


@app.command("fork")
def fork_session(
    session_id: SessionId,
    at: Annotated[str | None, typer.Option(help="The id of the last entry to share, as `tail` shows it.")] = None,
    own_id: Annotated[str | None, typer.Option("--id", help="An id of your own for the fork.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Make a session that shares this one's history and KV. Prints its id."""
    with _client(url, api_key) as client:
        fork = client.fork(session_id, revision=client.read(session_id).revision, at=at, id=own_id)
    print(visible(fork.id))


@app.command("rewind")
def rewind_session(
    session_id: SessionId,
    to: Annotated[str, typer.Option(help="The id of the entry that is to be the newest, or `start`.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take back the entries of a session after one of them. Lists what goes, and asks."""
    at = None if to == "start" else to
    with _client(url, api_key) as client:
        revision = client.read(session_id).revision
        rows = [
            {"id": one.id, "seq": one.seq, "kind": one.kind.value, "text": entry_text(one)}
            for one in _entries(client, session_id, after=at)
        ]
        if not as_json:
            show_rows(rows, as_json=False, none="nothing comes after it")
        if not dry_run and rows:
            confirm(f"Take back {len(rows)} entries of {session_id}?", yes=yes)
            client.rewind(session_id, at, revision=revision)
    if as_json:
        show_json({"dry_run": dry_run, "entries": rows})
    else:
        say(f"{len(rows)} entries {'would be' if dry_run else 'are'} taken back")


@app.command("kv")
def show_kv(
    session_id: SessionId,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show where a session's KV is, what the session waits for, and what would move its KV."""
    with _client(url, api_key) as client:
        found = client.kv(session_id)
    if as_json:
        show_json(found.model_dump(mode="json"))
        return
    if found.tiers:
        rows = [(name, tier.tokens, f"{tier.bytes / 1e6:,.1f}") for name, tier in found.tiers.items()]
        show_table(("tier", "tokens", "MB"), rows, right=("tokens", "MB"))
    for line in placement_lines(found):
        show_line(line)


@app.command("pin")
def pin_kv(
    session_id: SessionId,
    lasting: Annotated[str, typer.Option("--for", help="For how long: 90s, 30m, 2h, 1d.")],
    tier: Annotated[str, typer.Option(help="Where it stays: device, host or nvme.")] = "device",
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Let a session's KV stay where it is for a time, in place of its pin before."""
    with _client(url, api_key) as client:
        found = client.pin(session_id, ttl_s=_seconds(lasting), tier=tier)
    until = found.expires_at.isoformat(timespec="seconds")
    show_line(f"{found.state}: {found.tokens:,} tokens, {found.bytes / 1e6:,.1f} MB on {found.tier} until {until}")


@app.command("unpin")
def unpin_kv(session_id: SessionId, url: Url = None, api_key: ApiKey = None) -> None:
    """End a session's pin, if it has one."""
    with _client(url, api_key) as client:
        client.unpin(session_id)


@app.command("prefetch")
def prefetch_kv(
    session_id: SessionId,
    tier: Annotated[str, typer.Option(help="Where it is brought: host or device.")] = "host",
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Bring a session's KV back before its next request needs it."""
    with _client(url, api_key) as client:
        found = client.prefetch(session_id, tier=tier)
    print(f"operation {found.id}: {found.state}")


@app.command("demote")
def demote_kv(session_id: SessionId, url: Url = None, api_key: ApiKey = None) -> None:
    """Let a session's KV leave the device before others do. It stays where it is stored."""
    with _client(url, api_key) as client:
        found = client.demote(session_id)
    print(f"operation {found.id}: {found.state}")


_FORMAT = 1
_ABOUT = ("id", "model", "metadata", "cache_salt", "extra_key")
# A body of the service's may have 8 MiB.
_MOST_ENTRIES, _MOST_CHARACTERS = 1000, 4 << 20


def _sessions(client: Client, order: str) -> Iterator[Session]:
    after = None
    while True:
        page = client.list_sessions(after=after, limit=_PAGE, order=order)
        yield from page.data
        if not page.has_more:
            return
        after = page.last_id


def _entries(client: Client, session_id: str, *, after: str | None = None) -> Iterator[Entry]:
    while True:
        page = client.entries(session_id, after=after, limit=_MOST_ENTRIES)
        yield from page.data
        if not page.has_more:
            return
        after = page.last_id


def _cell(name: str, value: Any) -> Any:
    """A field of a session for people: times to the second, metadata as it would be sent."""
    if name.endswith("_at") and isinstance(value, str):
        return re.sub(r"\.\d+", "", value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _print_event(event: Event, as_json: bool) -> None:
    from agentstate.answers import Entry, Rewound

    if as_json:
        kind = {"Entry": "entry", "Rewound": "rewind"}.get(type(event).__name__, "session")
        print(json.dumps({"event": kind, **event.model_dump(mode="json")}), flush=True)
    elif isinstance(event, Entry):
        call = f" {event.call_id}" if event.call_id else ""
        print(visible(f"{event.seq:>6}  {event.id}  {event.kind.value}{call}  {entry_text(event)}"), flush=True)
    elif isinstance(event, Rewound):
        print(f"        rewound: the entries after {event.seq} are taken back", flush=True)
    else:
        print(visible(f"        {event.status.value}, revision {event.revision}"), flush=True)


def entry_text(entry: Entry) -> str:
    """What an entry says, in one line."""
    payload = entry.payload
    content = payload.get("content")
    text = json.dumps(payload, ensure_ascii=False)
    if isinstance(content, str):
        text = f"{payload.get('role', '')}: {content}"
    more = len(text) - _SHOWN_CHARACTERS
    return f"{text[:_SHOWN_CHARACTERS]}… ({more:,} more characters)" if more > 0 else text


def _exported(client: Client, session_id: str) -> Iterator[str]:
    """The lines of an export: of the history as it is when that begins."""
    session = client.read(session_id)
    yield _line({"agentstate": _FORMAT, **{name: getattr(session, name) for name in _ABOUT}})
    newest = None
    if session.head_id is not None:
        for entry in _entries(client, session_id):
            yield _line({"kind": entry.kind.value, "call_id": entry.call_id, "payload": entry.payload})
            if (newest := entry.id) == session.head_id:
                break
    if newest != session.head_id:
        raise RevisionStale("the session was rewound meanwhile: export it again")


def _line(value: dict[str, Any]) -> str:
    # In one order: a database may keep another one.
    return json.dumps(value, sort_keys=True) + "\n"


def _imported(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an export says of its session, and its entries. Raises SettingsError if it is none."""
    name = "standard input" if str(file) == "-" else str(file)
    try:
        lines = (sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")).split("\n")
        about, *entries = [json.loads(line) for line in lines if line]
        if about.pop("agentstate", None) != _FORMAT or set(about) != set(_ABOUT):
            raise ValueError("the first line is not that of an export that this release reads")
        for number, entry in enumerate(entries, 2):
            if not isinstance(entry, dict) or set(entry) != {"kind", "call_id", "payload"}:
                raise ValueError(f"line {number} is no entry")
    except OSError as error:
        raise SettingsError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise SettingsError(f"{name} is no export of a session: {error}") from error
    return about, entries


def _append(client: Client, session_id: str, entries: list[dict[str, Any]]) -> None:
    if not entries:
        return
    lease = client.resume(session_id, tail=0, lease_ttl_s=3600).lease
    try:
        _append_batches(client, session_id, lease, entries)
    finally:
        client.suspend(session_id, lease, reason="other", durable_timeout_ms=0)


def _append_batches(client: Client, session_id: str, lease: Lease, entries: list[dict[str, Any]]) -> None:
    batch: list[dict[str, Any]] = []
    characters = 0
    for entry in entries:
        size = len(json.dumps(entry))
        if batch and (len(batch) == _MOST_ENTRIES or characters + size > _MOST_CHARACTERS):
            client.append(session_id, lease, batch)
            batch, characters = [], 0
        batch.append(entry)
        characters += size
    client.append(session_id, lease, batch)


def _doomed(client: Client, session: Session) -> dict[str, Any]:
    """What goes with a session."""
    newest = client.entries(session.id, limit=1, order="desc").data
    tiers = client.kv(session.id).tiers
    return {
        "id": session.id,
        "model": session.model,
        "status": session.status.value,
        "last_seq": newest[0].seq if newest else 0,
        "kv_bytes": tiers["disk"].bytes if "disk" in tiers else None,
    }


def _client(url: str | None, api_key: str | None) -> Client:
    from agentstate.client import Client

    settings = loading.settings()
    return Client(url or f"http://{settings.host}:{settings.port}", api_key=api_key)


def _seconds(text: str) -> float:
    """The seconds of ``90``, ``90s``, ``30m``, ``2h`` or ``1d``. Raises SettingsError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)
    if found is None or not float(found[1]):
        raise SettingsError(f"{text!r} is no time: 90s, 30m, 2h, 1d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def placement_lines(found: Placement) -> list[str]:
    lines = [f"engine: {found.engine or 'none'}"]
    if (wait := found.wait) is not None:
        kind = f" for a {wait.kind}" if wait.kind in ("tool", "person") else ""
        said = {"served": "a request of it is served", "released": "nobody is expected back"}
        line = said.get(wait.state, f"waits{kind}") + f" since {wait.waited_s:,.1f} s"
        if wait.rest_p50_s is not None:
            late = "later" if wait.rest_p90_s is None else f"in {wait.rest_p90_s:,.1f} s"
            line += f"; is back in {wait.rest_p50_s:,.1f} s (one in two), {late} (nine in ten)"
        lines.append(line)
    if found.index is not None and found.place is not None:
        lines.append(f"worth {found.index:.3g} a byte and second on the device: place {found.place}")
    if (fetch := found.fetch) is not None:
        because = f", {fetch.reason}" if fetch.reason else ""
        lines.append(f"fetched {fetch.ago_s:,.1f} s ago, {fetch.tokens:,} tokens: {fetch.outcome}{because}")
    if found.pin is not None:
        lines.append(f"pinned to {found.pin.tier} for {found.pin.rest_s:,.0f} s more")
    if found.left_tokens:
        lines.append(f"{found.left_tokens:,} tokens on the device that it has left: they leave first")
    if found.durable_on is not None:
        where = {"node": "on the drive of its node", "shared": "in the shared store"}[found.durable_on]
        lines.append(f"durable {where}")
    if found.account is not None:
        held = []
        for tier, of_tier in found.account.tiers.items():
            limit = "" if of_tier.limit is None else f" of {of_tier.limit / 1e6:,.1f}"
            if of_tier.bytes is not None:
                held.append(f"{of_tier.bytes / 1e6:,.1f}{limit} MB on {tier}")
        lines.append(f"charged to {found.account.name}: {', '.join(held)}")
    for made in found.decisions[-_DECISIONS:]:
        lines.append(f"{made.at:%H:%M:%S} {made.decision}, {made.tokens:,} tokens: {made.outcome}")
    for one in found.restores[-_DECISIONS:]:
        tiers = " and ".join(f"{tokens:,} tokens from {tier}" for tier, tokens in one.tokens.items())
        rate = f", {one.bytes / one.seconds / 1e9:.2f} GB/s" if one.seconds else ""
        lines.append(f"{one.at:%H:%M:%S} restored {tiers} in {1000 * one.seconds:,.1f} ms{rate} ({one.why})")
    return [*lines, found.next] if found.next else lines

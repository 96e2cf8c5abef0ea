"""The screens of `agentstate top`. Nothing else imports Textual.

A screen asks the service for what it shows, every few seconds, and for no more. What users and tools wrote is never
taken for markup, and its control characters are spelt out (`output.visible`). The colours are the terminal's own; what
matters is said in words.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Input, Static
from textual.worker import Worker

from agentstate.answers import Overview, SessionOverview
from agentstate.cli import top_rows
from agentstate.cli.output import visible
from agentstate.cli.sessions import entry_text, placement_lines
from agentstate.cli.top_rows import Choice
from agentstate.client import AsyncClient
from agentstate.errors import AgentStateError

_ENTRIES = 20
_DECISIONS = 50
_PIN_S, _PIN_FOR = 2 * 3600.0, "2h"
_VIEWS = ("sessions", "engines", "tiers", "tenants")


@dataclass(frozen=True)
class Action:
    """What can be done to a session. ``act`` returns what has come of it; ``words`` are the same on the command line,
    before and after the id."""

    title: str
    meaning: str
    act: Callable[[AsyncClient, str], Awaitable[str]]
    words: tuple[tuple[str, ...], tuple[str, ...]]

    def command(self, session_id: str) -> str:
        before, after = self.words
        return shlex.join(["agentstate", "sessions", *before, session_id, *after])


async def _prefetch(client: AsyncClient, session_id: str) -> str:
    found = await client.prefetch(session_id)
    return f"prefetch: operation {found.id} is {found.state}"


async def _demote(client: AsyncClient, session_id: str) -> str:
    found = await client.demote(session_id)
    return f"demote: operation {found.id} is {found.state}"


async def _pin(client: AsyncClient, session_id: str) -> str:
    found = await client.pin(session_id, ttl_s=_PIN_S)
    return f"pin: {found.state}, {found.tokens:,} tokens on {found.tier} until {found.expires_at:%H:%M:%SZ}"


async def _unpin(client: AsyncClient, session_id: str) -> str:
    await client.unpin(session_id)
    return "the pin was ended"


async def _fork(client: AsyncClient, session_id: str) -> str:
    session = await client.read(session_id)
    fork = await client.fork(session_id, revision=session.revision)
    return f"the fork is {fork.id}"


ACTIONS = {
    "prefetch": Action(
        "Bring the KV back",
        "The engine reads the session's pages to host memory before its next request needs them.",
        _prefetch,
        (("prefetch",), ("--tier", "host")),
    ),
    "demote": Action(
        "Let the KV leave the device",
        "The session's pages are the first to leave the device. They stay stored, and its next request restores them.",
        _demote,
        (("demote",), ()),
    ),
    "pin": Action(
        "Keep the KV on the device for 2 hours",
        "What is pinned leaves last, and leaves where a request that runs needs all of the room.",
        _pin,
        (("pin",), ("--tier", "device", "--for", _PIN_FOR)),
    ),
    "unpin": Action("End the pin", "The session's pages leave when others are worth more.", _unpin, (("unpin",), ())),
    "fork": Action(
        "Fork the session",
        "A new session is made that shares all of its history. Nothing is copied, and this one stays as it is.",
        _fork,
        (("fork",), ()),
    ),
}
_ACTION_KEYS = [
    Binding("p", "app.do('prefetch')", "Prefetch"),
    Binding("d", "app.do('demote')", "Demote"),
    Binding("i", "app.do('pin')", "Pin"),
    Binding("u", "app.do('unpin')", "Unpin", show=False),
    Binding("k", "app.do('fork')", "Fork"),
    Binding("c", "app.copy", "Copy id"),
]


class Confirm(ModalScreen[bool]):
    """Asks whether an action is meant: what it does to what, and its command."""

    BINDINGS = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, action: Action, session_id: str, standing: str):
        super().__init__()
        self._told = [action.title, session_id, standing, "", action.meaning, "", f"$ {action.command(session_id)}"]

    def compose(self) -> ComposeResult:
        lines = "\n".join(visible(line) for line in self._told)
        yield VerticalScroll(Static(Text(f"{lines}\n\nDo it?  y yes   n no")), id="question")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class Details(Screen[None]):
    """One thing, in lines. ``ask`` is asked for them again and again; ``session_id`` is that of a session."""

    BINDINGS = [*_ACTION_KEYS, Binding("escape,q", "back", "Back")]

    def __init__(self, title: str, ask: Callable[[AsyncClient], Awaitable[list[str]]], session_id: str | None):
        super().__init__()
        self._title = title
        self._ask = ask
        self.session_id = session_id

    def compose(self) -> ComposeResult:
        yield Static(Text(visible(self._title), style="bold"), id="title")
        yield Static("", id="head")
        yield VerticalScroll(Static("", id="told"), id="scroll")
        yield Static("", id="note")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        top_of(self).look()

    async def fetch(self, client: AsyncClient) -> None:
        lines = await self._ask(client)
        if not self.is_attached:
            return  # the user has gone back
        self.query_one("#told", Static).update(Text("\n".join(visible(line) for line in lines)))

    def action_back(self) -> None:
        self.dismiss(None)

    @property
    def chosen(self) -> str:
        return self.session_id or self._title

    def standing(self) -> str:
        return ""


class Lists(Screen[None]):
    """The sessions, engines, tiers or tenants, one a row."""

    BINDINGS = [
        *(Binding(str(number), f"view('{name}')", name, show=False) for number, name in enumerate(_VIEWS, 1)),
        Binding("slash", "filter", "Filter"),
        Binding("s", "sort", "Sort"),
        Binding("t", "state", "State"),
        Binding("n", "turn(True)", "Next", show=False),
        Binding("b", "turn(False)", "Before", show=False),
        *_ACTION_KEYS,
        Binding("escape", "unfilter", "All", show=False),
        Binding("q", "app.quit", "Quit"),
    ]

    def __init__(self, choice: Choice):
        super().__init__()
        self.view = "sessions"
        self.choice = choice
        # Of the other lists: what rows contain, and the number of the column that orders them.
        self._contains = ""
        self._by: dict[str, int] = {}
        # The places after which the lists before this one, and this one, begin.
        self._places: list[str | None] = [None]
        self._following: str | None = None
        self._overview: Overview | None = None
        self._sessions: list[SessionOverview] = []
        self._shown: list[str] = []
        self._header: tuple[str, ...] = ()
        # Whether the user has asked for other rows since the last answer: then the cursor begins at the first.
        self._anew = False

    def compose(self) -> ComposeResult:
        yield Static("", id="title")
        yield Static("", id="head")
        yield Static("", id="alarms")
        table: DataTable[Text] = DataTable(id="table", cursor_type="row", zebra_stripes=False)
        yield table
        yield Input(id="filter", placeholder="what ids begin with; Enter, or Escape for all")
        yield Static("", id="note")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#table").focus()

    async def fetch(self, client: AsyncClient) -> None:
        asked = self.view, self.choice, self._places[-1]
        overview, page = await client.overview(), None
        if self.view == "sessions":
            page = await client.session_overviews(
                state=self.choice.state,
                sort=self.choice.sort,
                search=self.choice.search,
                after=self._places[-1],
            )
        if asked != (self.view, self.choice, self._places[-1]) or not self.is_attached:
            return  # the user has gone on, and what that needs has been asked for
        self._overview = overview
        if page is not None:
            self._sessions, self._following = page.data, page.next
        self._draw()
        self._anew = False

    # --- what is shown

    def _draw(self) -> None:
        if (overview := self._overview) is None:
            return
        held = []
        for name, of in overview.tiers.items():
            limit = "" if of.limit is None else f" of {top_rows.size(of.limit)}"
            held.append(f"{name} {top_rows.cell('bytes', of.bytes)}{limit}")
        self.query_one("#title", Static).update(
            Text(f"tenant {visible(overview.tenant)}   {top_rows.counts(overview)}\nKV: {'   '.join(held)}")
        )
        alarms = [f"! {visible(alarm)}" for alarm in overview.alarms]
        self.query_one("#alarms", Static).update(Text("\n".join(alarms), style="bold"))
        self.query_one("#alarms").display = bool(alarms)
        header, rows, keys = self._rows(overview)
        self._fill(header, rows, keys)

    def _rows(self, overview: Overview) -> tuple[tuple[str, ...], list[list[Any]], list[str]]:
        if self.view == "sessions":
            rows = [top_rows.session_row(one, overview.taken_at) for one in self._sessions]
            return top_rows.SESSION_COLUMNS, rows, [one.id for one in self._sessions]
        header, rows, key = {
            "engines": (top_rows.ENGINE_COLUMNS, top_rows.engine_rows(overview), -1),
            "tiers": (top_rows.TIER_COLUMNS, top_rows.tier_rows(overview.tiers), 0),
            "tenants": (top_rows.TENANT_COLUMNS, top_rows.tenant_rows(overview), 0),
        }[self.view]
        wanted = self._contains.lower()
        rows = [row for row in rows if any(wanted in str(value).lower() for value in row)]
        if (by := self._by.get(self.view)) is not None:
            down = header[by] in top_rows.NUMBERS
            known = [row for row in rows if row[by] is not None]
            rows = sorted(known, key=lambda row: row[by], reverse=down) + [row for row in rows if row[by] is None]
        return header, rows, [str(row[key]) for row in rows]

    def _fill(self, header: tuple[str, ...], rows: list[list[Any]], keys: list[str]) -> None:
        """Put rows into the table. The cursor stays on what it is on, and the table where it is scrolled to."""
        table: DataTable[Text] = self.query_one("#table", DataTable)
        cells = [[_cell(name, value) for name, value in zip(header, row, strict=True)] for row in rows]
        if (header, keys) == (self._header, self._shown):
            for key, row in zip(keys, cells, strict=True):
                for name, text in zip(header, row, strict=True):
                    if table.get_cell(key, name) != text:
                        table.update_cell(key, name, text, update_width=True)
            return
        on, x, y = self.row, table.scroll_x, table.scroll_y
        same = header == self._header
        table.clear(columns=not same)
        if not same:
            for name in header:
                table.add_column(Text(name, justify="right" if name in top_rows.NUMBERS else "left"), key=name)
        for key, row in zip(keys, cells, strict=True):
            table.add_row(*row, key=key)
        self._header, self._shown = header, keys
        self.refresh_bindings()
        if same and on in keys and not self._anew:
            table.move_cursor(row=keys.index(on), animate=False, scroll=False)
            table.scroll_to(x, y, animate=False, force=True)

    def about(self) -> str:
        """Which rows are shown, in words."""
        if self.view == "sessions":
            words = [f"sessions, {top_rows.SORTS[self.choice.sort]}"]
            words += [f"{self.choice.state} only"] if self.choice.state else []
            words += [f"ids that begin with {visible(self.choice.search)!r}"] if self.choice.search else []
            words += [f"part {len(self._places)}"] if len(self._places) > 1 else []
            words += ["n: more"] if self._following else []
            return ", ".join(words)
        words = [self.view]
        words += [f"by {self._header[by]}"] if (by := self._by.get(self.view)) is not None and self._header else []
        words += [f"with {visible(self._contains)!r}"] if self._contains else []
        if self.view == "tenants" and self._overview is not None and self._overview.tenants is None:
            words += ["which only a key with the role admin sees"]
        elif self.view == "tenants" and not self._shown and not self._contains:
            words += ["of which the first key makes one"]
        return ", ".join(words)

    # --- what the user does

    @property
    def row(self) -> str | None:
        """The key of the row that the cursor is on."""
        if not self._shown:
            return None
        at = self.query_one("#table", DataTable).cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @property
    def chosen(self) -> str | None:
        return self.row

    @property
    def session_id(self) -> str | None:
        return self.row if self.view == "sessions" else None

    def standing(self) -> str:
        one = next((one for one in self._sessions if one.id == self.row), None)
        return "" if one is None else f"{one.state}, {one.tokens:,} tokens stored, {top_rows.size(one.bytes)}"

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.view == "sessions" or action not in ("state", "turn")

    def _again(self, *, choice: Choice | None = None, places: list[str | None] | None = None) -> None:
        """Show other rows."""
        self.choice = choice or self.choice
        self._places, self._anew = places or [None], True
        self.refresh_bindings()
        self._draw()
        top_of(self).look()

    def action_view(self, name: str) -> None:
        self.view, self._contains = name, ""
        self._again()

    def action_sort(self) -> None:
        if self.view == "sessions":
            sorts = list(top_rows.SORTS)
            self._again(choice=replace(self.choice, sort=sorts[(sorts.index(self.choice.sort) + 1) % len(sorts)]))
        elif self._header:
            self._by[self.view] = (self._by.get(self.view, -1) + 1) % len(self._header)
            self._again()

    def action_state(self) -> None:
        states: list[str | None] = [None, *top_rows.STATES]
        self._again(choice=replace(self.choice, state=states[(states.index(self.choice.state) + 1) % len(states)]))

    def action_turn(self, on: bool) -> None:
        if on and self._following:
            self._again(places=[*self._places, self._following])
        elif not on and len(self._places) > 1:
            self._again(places=self._places[:-1])

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.value = self.choice.search if self.view == "sessions" else self._contains
        box.display = True
        box.focus()

    def action_unfilter(self) -> None:
        self._filter("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._filter(event.value.strip())

    def _filter(self, text: str) -> None:
        self.query_one("#filter").display = False
        self.query_one("#table").focus()
        if self.view == "sessions":
            self._again(choice=replace(self.choice, search=text))
        else:
            self._contains = text
            self._again()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if (key := self.row) is None:
            return
        if self.view == "sessions":
            self.app.push_screen(Details(key, lambda client: _session(client, key), key))
        elif self.view == "engines" and self._overview is not None:
            self.app.push_screen(Details(key, lambda client: _engine(client, key), None))


class Top(App[None]):
    """``connect`` makes a client of the service at ``where``, which is asked every ``every_s`` seconds."""

    CSS = """
    Screen { background: ansi_default; color: ansi_default; }
    #title, #head, #note, #alarms { height: auto; }
    #table { height: 1fr; background: ansi_default; }
    #scroll { height: 1fr; }
    #filter { height: 3; }
    DataTable > .datatable--cursor { background: ansi_default; color: ansi_default; text-style: reverse; }
    DataTable > .datatable--header { background: ansi_default; color: ansi_default; text-style: bold; }
    DataTable > .datatable--hover { background: ansi_default; }
    Confirm { align: center middle; }
    #question { width: 72; height: auto; max-height: 90%; border: solid ansi_default; padding: 0 1; }
    """
    TITLE = "agentstate top"
    ENABLE_COMMAND_PALETTE = False

    def __init__(
        self,
        connect: Callable[[], AsyncClient],
        where: str,
        choice: Choice,
        every_s: float,
        *,
        read_only: bool = False,
    ):
        # From the beginning: by this Textual decides what NO_COLOR means.
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self.animation_level = "none"
        self._connect = connect
        self._where = where
        self._every_s = every_s
        self._read_only = read_only
        self._lists = Lists(choice)
        self._client: AsyncClient | None = None
        self._looking: Worker[None] | None = None
        self._answered_s: float | None = None
        self._error: AgentStateError | None = None

    async def on_mount(self) -> None:
        self._client = self._connect()
        await self.push_screen(self._lists)
        self.look()
        self.set_interval(self._every_s, self._look_again)
        # How old what is shown is, while the service does not answer.
        self.set_interval(1.0, self._head)

    async def on_unmount(self) -> None:
        if self._client is not None:
            await self._client.close()

    def look(self) -> None:
        """Ask for what the screen shows now. What was asked for before is not waited for any more."""
        self._looking = self.run_worker(self._look, group="look", exclusive=True)

    def _look_again(self) -> None:
        """The same, unless an answer is still waited for."""
        if self._looking is None or self._looking.is_finished:
            self.look()

    async def _look(self) -> None:
        # Under a question, the screen that has asked it stays as it is.
        shown = self.shown
        if self._client is None or shown is None:
            return
        try:
            await shown.fetch(self._client)
        except AgentStateError as error:
            self._error = error
        else:
            self._error, self._answered_s = None, time.monotonic()
        self._head()

    @property
    def stale(self) -> bool:
        """Whether what is shown may be out of date: then nothing is done to it."""
        return self._error is not None

    @property
    def shown(self) -> Lists | Details | None:
        """The screen that is in front; None while that is a question, or has not been drawn yet."""
        shown = self.screen
        return shown if isinstance(shown, Lists | Details) and shown.is_mounted and shown.is_attached else None

    def _head(self) -> None:
        if (shown := self.shown) is None:
            return
        told = Text(visible(self._where))
        if isinstance(shown, Lists):
            for number, name in enumerate(_VIEWS, 1):
                told.append("   ").append(f" {number} {name} ", "reverse" if name == shown.view else "")
            told.append(f"\n{shown.about()}")
        if self._error is not None:
            since = (
                "" if self._answered_s is None else f", as of {top_rows.ago(time.monotonic() - self._answered_s)} ago"
            )
            what = f"OUT OF DATE{since}: {visible(self._error)}. {top_rows.remedy(self._error)}"
            told = Text(what, style="bold reverse")
        shown.query_one("#head", Static).update(told)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        shown = self.screen
        return action != "do" or (isinstance(shown, Lists | Details) and shown.session_id is not None)

    def say(self, text: str) -> None:
        """A line below what is shown."""
        for screen in self.screen_stack:
            if isinstance(screen, Lists | Details) and screen.is_mounted:
                screen.query_one("#note", Static).update(Text(visible(text)))

    def action_copy(self) -> None:
        if (shown := self.shown) is not None and (chosen := shown.chosen):
            # By OSC 52: the terminal takes it, not what runs here.
            self.copy_to_clipboard(chosen)
            self.say(f"copied: {chosen}")

    def action_do(self, name: str) -> None:
        """Do something to a session, once the user has said that it is meant."""
        if (shown := self.shown) is None or (session_id := shown.session_id) is None:
            return
        if self._read_only:
            self.say("nothing is changed with --read-only")
        elif self.stale:
            self.say("nothing is done while what is shown is out of date")
        else:
            action = ACTIONS[name]

            def answered(meant: bool | None) -> None:
                if meant:
                    self.run_worker(self._do(action, session_id), group="do")

            self.push_screen(Confirm(action, session_id, shown.standing()), answered)

    async def _do(self, action: Action, session_id: str) -> None:
        assert self._client is not None
        try:
            self.say(await action.act(self._client, session_id))
        except AgentStateError as error:
            self.say(f"not done: {error}")
        self.look()


def top_of(screen: Screen[Any]) -> Top:
    app = screen.app
    assert isinstance(app, Top)
    return app


def _cell(name: str, value: Any) -> Text:
    return Text(visible(top_rows.cell(name, value)), justify="right" if name in top_rows.NUMBERS else "left")


async def _session(client: AsyncClient, session_id: str) -> list[str]:
    session = await client.read(session_id)
    placed = await client.kv(session_id)
    newest = (await client.entries(session_id, limit=_ENTRIES, order="desc")).data
    lines = [f"model: {session.model}", f"status: {session.status.value}, revision {session.revision}", ""]
    lines += [f"{name:>8} {of.tokens:>12,} tokens {top_rows.size(of.bytes):>10}" for name, of in placed.tiers.items()]
    about = f"the newest {len(newest)} entries:" if newest else "nothing is appended yet"
    lines += [*placement_lines(placed), "", about]
    return lines + [f"{one.seq:>6}  {one.kind.value}  {entry_text(one)}" for one in reversed(newest)]


async def _engine(client: AsyncClient, engine_id: str) -> list[str]:
    overview = await client.overview()
    one = next((one for one in overview.engines if one.id == engine_id), None)
    if one is None:
        return ["the engine is not registered any more"]
    lines = [f"{name}: {value}" for name, value in one.model_dump().items() if value is not None]
    found = await client.decisions(engine_id, after=_lately(overview), limit=1000)
    lines += ["", "decisions about your sessions in the last hour, the newest first:"]
    lines += [found.silent] if found.silent else []
    return lines + [
        f"{made.at:%H:%M:%S} {made.decision}, {made.outcome}, {made.tokens:,} tokens  {made.session_id}"
        for made in reversed(found.data[-_DECISIONS:])
    ]


def _lately(overview: Overview) -> str:
    """The id that a decision an hour ago has."""
    return str(int((overview.taken_at - timedelta(hours=1)).timestamp() * 1_000_000))

"""The console over HTTP: its pages, who sees what, and what a form may do."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import sqlalchemy as sa
import typer
from fastapi.routing import APIRoute
from sent import statements
from stage import MODEL, PATIENCE_S, Peer, Service, register, serving, stored, until
from test_http_api import assert_problem

from agentstate.api import gate
from agentstate.api.console import assets, commands, reading, render, routes, sessions, snapshot
from agentstate.api.console.render import POLICY
from agentstate.cli.main import app
from agentstate.fleet import manifests
from agentstate.fleet.engines import Phase
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Role
from agentstate.settings import Settings
from agentstate.sql.models import leases

STAT = {
    "ok": True,
    "off": None,
    "store": {"pages": 4, "extents": 2, "bytes": 1_500_000, "bytes_written": 2_000_000},
    "restore": {"restores": 7, "bytes_read": 9000, "pages_failed": 0},
    "spill": {"pages_failed": 0},
    "wear": {"bytes_day": 10, "budget": None},
    "served": {
        "hits": {"tool": {"device": {"tokens": 300, "requests": 2}, "recomputed": {"tokens": 100, "requests": 2}}}
    },
    "accounts": {
        "tenant mine": {"device": {"bytes": 11_000_000, "limit": None}},
        "tenant theirs": {"device": {"bytes": 22_000_000, "limit": None}},
    },
}
EXPLAINED = {
    "ok": True,
    "tiers": {name: {"tokens": 64, "bytes": 1000} for name in ("device", "host", "disk")},
    "wait": {"state": "waits", "kind": "tool", "waited_s": 4.0, "rest_p50_s": 3.0, "rest_p90_s": None},
    "index": 0.25,
    "place": 2,
    "restores": [
        {
            "id": 1_767_605_472_512_000,
            "session": "uid",
            "why": "request",
            "tokens": {"host": 64, "nvme": 128},
            "bytes": 3_000_000,
            "seconds": 0.002,
            "waited_s": 0.0005,
        }
    ],
    "page_map": [
        {"first": 0, "tokens": 128, "device": True, "host": True, "extent": "0a.ext", "shared_extent": "<i>s"},
        {"first": 128, "tokens": 64, "device": False, "host": False, "extent": "0b.ext", "shared_extent": None},
    ],
    "more_tokens": 7,
}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'>{{ 7*7 }}"


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(snapshot, "ASK_S", PATIENCE_S)


@pytest.fixture
def quiet_service(peers: list[Peer], database_url: str, tmp_path: Path) -> Iterator[Service]:
    """One that sends nothing to the database but what it is asked for."""
    settings = Settings(
        home=tmp_path, database_url=database_url, engine_timeout_s=3600, foresight=False, collect_interval_s=0
    )
    with serving(settings) as service:
        yield service


def answering(request: dict[str, Any]) -> dict[str, Any]:
    said = {"stat": STAT, "explain": EXPLAINED, "decisions": {"ok": True, "decisions": [], "more": False}}
    return said.get(request["verb"], stored("demoted" if request["verb"] == "demote" else "warm"))


class Browser:
    """What a browser does with a page's forms, but for the drawing."""

    def __init__(self, service: Service):
        self.http = httpx.Client(base_url=service.base_url, timeout=300, follow_redirects=False)

    def sign_in(self, key: str) -> httpx.Response:
        page = self.http.get("/sign-in")
        return self.http.post("/sign-in", data={"key": key, "csrf": token(page)}, headers=SAME)

    def post(self, path: str, page: str | None = None, **data: str) -> httpx.Response:
        """Send the form of a page, by default the one at the same path."""
        form = self.http.get(page or path)
        assert form.status_code == 200, form.text
        hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form.text))
        return self.http.post(path, data={**hidden, **data}, headers=SAME)


SAME = {"Sec-Fetch-Site": "same-origin"}


def token(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page.text)
    assert found is not None, page.text
    return found[1]


def key(service: Service, tenant: str, role: Role = Role.OPERATOR) -> str:
    with service.database.write() as connection:
        return tenants.create_key(connection, tenant, role=role).secret


def browser(service: Service, tenant: str, role: Role = Role.OPERATOR) -> Browser:
    signed_in = Browser(service)
    assert signed_in.sign_in(key(service, tenant, role)).status_code == 303
    return signed_in


def api(service: Service, tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key(service, tenant)}"}


def make(service: Service, headers: dict[str, str], session_id: str, **body: Any) -> None:
    body = {"id": session_id, "model": MODEL, **body}
    service.http.post("/v1/sessions", json=body, headers=headers).raise_for_status()


def append(service: Service, headers: dict[str, str], session_id: str, *entries: dict[str, Any]) -> dict[str, Any]:
    path = f"/v1/sessions/{session_id}"
    lease = service.http.post(f"{path}/resume", json={}, headers=headers).raise_for_status().json()["lease"]
    lease = {"token": lease["token"], "epoch": lease["epoch"]}
    body = {"lease": lease, "entries": list(entries)}
    service.http.post(f"{path}/entries", json=body, headers=headers).raise_for_status()
    return lease


def message(text: Any) -> dict[str, Any]:
    return {"kind": "message", "payload": {"role": "user", "content": text}}


def suspend(service: Service, headers: dict[str, str], session_id: str, lease: dict[str, Any]) -> None:
    body = {"lease": lease, "reason": "user_wait"}
    service.http.post(f"/v1/sessions/{session_id}/suspend", json=body, headers=headers).raise_for_status()


# --- who may look


def test_without_keys_it_is_for_this_machine_and_asks_for_no_key(service: Service) -> None:
    page = service.http.get("/")
    assert page.status_code == 200 and "default" in page.text and "(admin)" in page.text
    assert page.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
    assert page.headers["cache-control"] == "no-store"
    assert service.http.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert service.http.get("/sign-in").headers["location"] == "/"
    fresh = Browser(service)
    make(service, {}, "s")
    assert fresh.post("/sessions/s/do/fork").status_code == 303
    cross = {"Sec-Fetch-Site": "same-site"}
    form = token(fresh.http.get("/sessions/s/do/fork"))
    assert fresh.http.post("/sessions/s/do/fork", data={"csrf": form}, headers=cross).status_code == 403


def test_it_can_be_turned_off(database_url: str, tmp_path: Path) -> None:
    with serving(Settings(home=tmp_path, database_url=database_url, console=False)) as service:
        for path in ("/", "/sessions", "/sign-in", "/console/stream"):
            assert_problem(service.http.get(path), 404, "not-found")


def test_signing_in_and_out(service: Service) -> None:
    secret = key(service, "mine")
    visitor = Browser(service)
    asked = visitor.http.get("/sessions?search=a%2Fb")
    assert (asked.status_code, asked.headers["location"]) == (303, "/sign-in?next=%2Fsessions%3Fsearch%3Da%252Fb")
    assert visitor.http.get("/sessions", headers={"HX-Request": "true"}).status_code == 401
    assert visitor.sign_in("ags_wrong").status_code == 401
    done = visitor.sign_in(secret)
    assert (done.status_code, done.headers["location"]) == (303, "/")
    cookie = done.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and secret.lower() not in cookie
    assert visitor.http.get("/sessions").status_code == 200
    copied = dict(visitor.http.cookies)
    out = visitor.post("/sign-out", page="/sessions")
    assert (out.status_code, out.headers["location"]) == (303, "/sign-in")
    assert httpx.get(f"{service.base_url}/sessions", cookies=copied).status_code == 303, "the row is gone, too"


@pytest.mark.parametrize("elsewhere", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb", ""])
def test_signing_in_leads_nowhere_else(service: Service, elsewhere: str) -> None:
    secret, visitor = key(service, "mine"), Browser(service)
    form = {"key": secret, "csrf": token(visitor.http.get("/sign-in")), "next": elsewhere}
    assert visitor.http.post("/sign-in", data=form, headers=SAME).headers["location"] == "/"


def test_behind_tls_the_cookie_is_of_this_host_alone(service: Service) -> None:
    page = service.http.get("/sign-in", headers={"X-Forwarded-Proto": "https"})
    key(service, "mine")
    page = service.http.get("/sign-in", headers={"X-Forwarded-Proto": "https"})
    cookie = page.headers["set-cookie"]
    assert cookie.startswith("__Host-agentstate_console=") and "Secure" in cookie and "Path=/" in cookie


def test_a_revoked_key_and_a_changed_role_hold_at_once(service: Service) -> None:
    operator = browser(service, "mine")
    make(service, api(service, "mine"), "s")
    assert operator.http.get("/sessions/s/do/fork").status_code == 200
    with service.database.write() as connection:
        own = tenants.list_keys(connection)[0]
        tenants.set_role(connection, own.id, Role.VIEWER)
    assert operator.http.get("/sessions/s/do/fork").status_code == 403
    assert operator.http.get("/sessions/s").status_code == 200
    with service.database.write() as connection:
        tenants.revoke_key(connection, own.id)
    assert operator.http.get("/sessions/s").status_code == 303


def routes_of(method: str) -> list[str]:
    found = [route for part in routes.PARTS for route in part.router.routes if isinstance(route, APIRoute)]
    paths = [route.path for route in found if method in route.methods]
    values = {"session_id": "s", "action": "fork", "kind": "csv", "seq": "1"}
    return [re.sub(r"{(\w+)}", lambda name: values.get(name[1], name[0]), path) for path in paths]


def test_every_page_for_every_role(service: Service, start_peer: Callable[..., Peer]) -> None:
    engine = register(service.database, start_peer(answering).address)
    headers = api(service, "mine")
    make(service, headers, "s")
    append(service, headers, "s", message("hello"))
    with service.database.read() as connection:
        some_key = tenants.list_keys(connection)[0].id
    pages = [path.replace("{engine_id}", engine.id).replace("{key_id}", some_key) for path in routes_of("GET")]
    pages = [path for path in pages if "assets" not in path and path != "/console/stream"]
    assert len(pages) > 12
    of_admins = [path for path in pages if path.startswith("/tenants")]
    of_actors = [path for path in pages if "/do/" in path]
    for role in Role:
        looks = browser(service, "mine", role)
        for path in pages:
            answer = looks.http.get(path)
            allowed = (path not in of_admins or role is Role.ADMIN) and (
                path not in of_actors or role is not Role.VIEWER
            )
            expected = 303 if path == "/sign-in" else 200 if allowed else 403
            assert answer.status_code == expected, (role, path)
            if role is Role.VIEWER and expected == 200:
                assert "data-action" not in answer.text, path
    assert len(of_admins) == 2 and len(of_actors) == 1


def test_no_form_is_taken_from_elsewhere_or_from_who_may_not(service: Service) -> None:
    make(service, {}, "s")
    signed = browser(service, "default", Role.ADMIN)
    form = token(signed.http.get("/sessions/s/do/fork"))
    viewer = browser(service, "default", Role.VIEWER)
    posts = [path.replace("{key_id}", "key_x") for path in routes_of("POST")]
    assert len(posts) == 5
    for path in posts:
        tries: list[tuple[dict[str, str], dict[str, str]]] = [
            ({}, SAME),
            ({"csrf": "0" * 64}, SAME),
            ({"csrf": form}, {"Sec-Fetch-Site": "cross-site"}),
            ({"csrf": form}, {"Sec-Fetch-Site": "same-site"}),
            ({"csrf": form}, {"Origin": "http://evil.example"}),
        ]
        for data, headers in tries:
            assert signed.http.post(path, data=data, headers=headers).status_code == 403, (path, data, headers)
        if not path.startswith("/sign-"):
            own = token(viewer.http.get("/"))
            assert viewer.http.post(path, data={"csrf": own}, headers=SAME).status_code == 403, path
    assert len(service.http.get("/v1/sessions", headers=api(service, "default")).json()["data"]) == 1


def test_nothing_is_shown_of_another_tenant(service: Service, start_peer: Callable[..., Peer]) -> None:
    engine = register(service.database, start_peer(answering).address)
    theirs = api(service, "theirs")
    make(service, theirs, "their-session", metadata={"their": "data"})
    append(service, theirs, "their-session", message("their words"))
    make(service, api(service, "mine"), "my-session")
    for role in Role:
        mine = browser(service, "mine", role)
        for path in (
            "",
            "/entries/1",
            "/transcript.jsonl",
            *((f"/do/{one}" for one in ("delete", "pin")) if role.writes else ()),
        ):
            assert mine.http.get(f"/sessions/their-session{path}").status_code == 404, path
        pages = [
            "/",
            "/sessions",
            "/sessions?search=their",
            "/sessions?state=running",
            "/sessions?sort=id",
            "/sessions.csv",
        ]
        for path in (*pages, "/sessions.jsonl", "/engines", f"/engines/{engine.id}", "/stores"):
            text = mine.http.get(path).text
            assert "their-session" not in text and "their words" not in text, path
            if role is not Role.ADMIN:
                assert "theirs" not in text and "22.0 MB" not in text, path
                # Nor what engines count of all of them.
                assert "1.5 MB" not in text and "9.0 kB" not in text and "Counters" not in text, path
    administrator = browser(service, "mine", Role.ADMIN)
    assert "1.5 MB" in administrator.http.get("/stores").text
    assert "Counters" in administrator.http.get(f"/engines/{engine.id}").text
    assert "11.0 MB" in mine.http.get("/").text
    operator = browser(service, "mine")
    assert operator.post("/sessions/their-session/do/delete", page="/sessions/my-session/do/delete").status_code in (
        403,
        404,
    )
    assert service.http.get("/v1/sessions/their-session", headers=theirs).status_code == 200


# --- what people write


def quoted(text: str) -> str:
    return quote(text, safe="")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script":
            self.scripts += 1
            if not (given.get("src") or "").startswith(assets.PATH):
                self.wrong.append(tag)
        if tag in ("img", "iframe", "style", "object") or any(
            name.startswith("on") or name == "style" for name in given
        ):
            self.wrong.append(f"{tag} {given}")


def test_what_users_write_stays_text(service: Service, start_peer: Callable[..., Peer]) -> None:
    peer = start_peer(lambda request: {**answering(request), **({"off": EVIL} if request["verb"] == "stat" else {})})
    engine = register(
        service.database, peer.address, model=EVIL, node=EVIL, base_url=f"http://e/{EVIL}", shared_store=EVIL
    )
    with service.database.write() as connection:
        evil_key = tenants.create_key(connection, "mine", note=EVIL, role=Role.ADMIN)
    headers = {"Authorization": f"Bearer {evil_key.secret}"}
    evil_id = f"{EVIL}/ü"
    make(service, headers, evil_id, model=EVIL, metadata={EVIL: EVIL}, extra_key=EVIL)
    path = f"/v1/sessions/{quoted(evil_id)}"
    lease = service.http.post(f"{path}/resume", json={}, headers=headers).raise_for_status().json()["lease"]
    proof = {"token": lease["token"], "epoch": lease["epoch"]}
    entries = [
        message(EVIL),
        {"kind": "tool_call", "call_id": EVIL, "payload": {"name": EVIL, "arguments": {EVIL: EVIL}}},
        {"kind": "tool_result", "call_id": EVIL, "payload": {"output": f"\x1b[31m\u202e{EVIL}"}},
        {"kind": "note", "payload": {"role": EVIL}},
    ]
    service.http.post(f"{path}/entries", json={"lease": proof, "entries": entries}, headers=headers).raise_for_status()
    looks = Browser(service)
    looks.sign_in(evil_key.secret)
    own = f"/sessions/{quoted(evil_id)}"
    pages = [
        "/",
        "/sessions",
        f"/sessions?search={quoted(EVIL)}",
        own,
        f"{own}?before=3",
        "/engines",
        "/stores",
        "/tenants",
    ]
    pages += [f"{own}/do/{name}" for name in ("delete", "fork", "pin")] + [f"{own}/do/rewind?at={quoted(EVIL)}"]
    pages += [f"/engines/{engine.id}", f"/tenants/keys/{evil_key.key.id}/revoke", f"/sessions/{quoted(EVIL)}none"]
    for page in pages:
        answer = looks.http.get(page)
        found = Tags()
        found.feed(answer.text)
        assert (found.scripts, found.wrong) == (2, []), page
        assert "49" not in re.findall(r"&gt;(\d+)", answer.text), page
    text = looks.http.get(own).text
    assert "\\u001b[31m\\u202e" in text and "\x1b" not in text and "\u202e" not in text
    assert text.count("&lt;script&gt;") > 5


def test_a_spreadsheet_takes_no_text_for_a_formula(service: Service) -> None:
    for name in ("=1+1", "@cmd", "-x", "plain"):
        make(service, {}, name)
    rows = list(csv.DictReader(io.StringIO(service.http.get("/sessions.csv?sort=id").text)))
    assert sorted(row["id"] for row in rows) == ["'-x", "'=1+1", "'@cmd", "plain"]
    lines = [json.loads(line) for line in service.http.get("/sessions.jsonl").text.splitlines()]
    assert sorted(line["id"] for line in lines) == ["-x", "=1+1", "@cmd", "plain"]
    assert (sessions.safe(-5), sessions.safe("-5")) == (-5, "'-5")


# --- the lists


def fill(service: Service, count: int) -> None:
    """So many sessions, each with a turn that ended at a time of its own, and with what is stored of it."""
    for number in range(count):
        make(service, {}, f"s{number:04}")
    with service.database.write() as connection:
        rows = connection.exec_driver_sql("SELECT session_id FROM session_turns ORDER BY session_id").scalars().all()
        for number, uid in enumerate(rows):
            connection.exec_driver_sql(
                f"UPDATE session_turns SET turned_us = {1000 + number} WHERE session_id = '{uid}'"
            )
            manifests.save(connection, Manifest(uid, "f", 0, "n", "e", 64, 64, b"k" * 32, 5000))


def ids(page: str) -> list[str]:
    return re.findall(
        r'<tr id="row-[^"]*"><th scope="row"><a class="id" hx-ignore href="/sessions/[^"]*">([^<]*)</a>', page
    )


def test_a_list_is_paged_sorted_searched_and_filtered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 4)
    fill(service, 11)
    every = [f"s{number:04}" for number in range(11)]
    for sort, expected in (("newest", every[::-1]), ("oldest", every), ("id", every), ("-id", every[::-1])):
        found, path = [], f"/sessions?sort={sort}"
        while path:
            page = service.http.get(path).text
            found += ids(page)
            following = re.search(r'rel="next" href="([^"]*)"', page)
            path = following[1].replace("&amp;", "&") if following else ""
        assert found == expected, sort
    assert ids(service.http.get("/sessions?search=s000").text) == every[:4]
    assert ids(service.http.get("/sessions?search=s0010").text) == ["s0010"]
    assert ids(service.http.get("/sessions?search=S").text) == []
    assert ids(service.http.get("/sessions?search=%25").text) == []
    lease = append(service, {}, "s0003", message("x"))
    append(service, {}, "s0005", message("x"))
    with service.database.write() as connection:
        connection.execute(
            sa.update(leases)
            .where(leases.c.session_id.in_(sa.text("(SELECT id FROM sessions WHERE name = 's0005')")))
            .values(expires_us=1)
        )
    assert ids(service.http.get("/sessions?state=running").text) == ["s0003"]
    assert ids(service.http.get("/sessions?state=lapsed").text) == ["s0005"]
    suspend(service, {}, "s0003", lease)
    page = service.http.get("/sessions?state=suspended").text
    assert ids(page) == ["s0003"] and "waits for a person" in page
    assert ids(service.http.get("/sessions").text)[0] == "s0003", "its turn ended last"
    service.http.delete("/v1/sessions/s0010", headers={"If-Match": "*"}).raise_for_status()
    assert "s0010" not in service.http.get("/sessions").text
    for cursor in ("x", "[1]", "[]", '["a",1]', "[1,2,3]", '[-1,"a"]', '["\\u0000"]'):
        for sort in ("newest", "id"):
            assert service.http.get("/sessions", params={"cursor": cursor, "sort": sort}).status_code == 200


def test_counts_end_at_a_cap(service: Service) -> None:
    fill(service, 4)
    with service.database.read() as connection:
        assert reading.counts(connection, "default") == reading.Counts(4, 0, 0)
    page = service.http.get("/sessions").text
    assert ">4 sessions, 0 run" in page
    assert (render.counted(10_001, 10_000), render.counted(10_000, 10_000)) == ("10,000+", "10,000")


BIG = (
    "sessions",
    "entries",
    "leases",
    "manifests",
    "session_turns",
    "tool_calls",
    "segments",
    "blobs",
    "shared_extents",
)


def test_no_page_asks_more_of_sql_with_more_sessions_or_scans_a_table(
    quiet_service: Service, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = quiet_service
    engine = register(service.database, start_peer(answering).address)
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.0)
    monkeypatch.setattr(snapshot, "STALE_S", 0.0)
    make(service, {}, "s")
    append(service, {}, "s", *(message(f"{number}") for number in range(5)))
    paths = [
        "/",
        "/sessions",
        "/sessions?sort=oldest",
        "/sessions?sort=id",
        "/sessions?search=s",
        "/sessions?state=running",
    ]
    paths += ["/sessions?state=lapsed", "/sessions/s", "/sessions/s/do/delete", "/engines", f"/engines/{engine.id}"]
    paths += ["/stores", "/tenants"]

    def asked() -> dict[str, list[tuple[str, Any]]]:
        found = {}
        for path in paths:
            with statements() as seen:
                assert service.http.get(path).status_code == 200
            found[path] = [one for one in seen if not one[0].startswith("BEGIN")]
        return found

    service.http.get("/")  # takes the cookie
    few = asked()
    fill(service, 200)
    for number in range(5):
        service.http.post(
            "/v1/sessions/s/forks", json={"id": f"f{number}"}, headers={"If-Match": "*"}
        ).raise_for_status()
    many = asked()
    # What a page lists are the names of the forks, too, once there are some.
    assert {path for path in paths if len(many[path]) > len(few[path]) + ("/sessions/s" in path)} == set()
    assert max(len(found) for found in many.values()) <= 16
    if not service.database.is_sqlite:
        # For its clock, which may say another time for each row, PostgreSQL goes through no index.
        of_clock = re.compile(r"_us [<>]=? CAST\(EXTRACT")
        told = [statement for found in many.values() for statement, _ in found if of_clock.search(statement)]
        assert [one for one in told if any(f" {table} " in one.partition("WHERE")[0] for table in BIG)] == []
        return
    with service.database.read() as connection:
        for path, found in many.items():
            for statement, parameters in found:
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                scans = [row[3] for row in plan if re.match(rf"SCAN ({'|'.join(BIG)})\b", row[3])]
                assert scans == [], (path, statement, scans)


def test_one_snapshot_serves_all_viewers(
    service: Service, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 3600.0)
    peer = start_peer(answering)
    register(service.database, peer.address)
    make(service, {}, "s")
    append(service, {}, "s", message("x"))
    for _ in range(5):
        for path in ("/", "/engines", "/stores", "/sessions/s"):
            assert Browser(service).http.get(path).status_code == 200
    assert sorted(request["verb"] for request in peer.requests) == ["explain", "stat"]


# --- one session


def test_a_long_transcript_is_cut_and_whole_as_a_file(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ENTRIES", 5)
    make(service, {}, "s")
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 400}"}}
    entries = [message(f"word{number}") for number in range(8)]
    entries += [
        message("é" * 5000),
        message("large " * 60_000),
        {"kind": "note", "payload": {"n": 2**53 + 1}},
        message([image]),
    ]
    append(service, {}, "s", *entries)
    page = service.http.get("/sessions/s").text
    assert re.findall(r'id="entry-(\d+)"', page) == ["8", "9", "10", "11", "12"]
    assert f"{2**53 + 1}" in page and "[image/png, 300 bytes]" in page and "AAAA" not in page
    assert page.count("All of it") == 2 and len(page) < 60_000
    earlier = service.http.get("/sessions/s?before=8").text
    assert re.findall(r'id="entry-(\d+)"', earlier) == ["3", "4", "5", "6", "7"] and "word6" in earlier
    assert service.http.get("/sessions/s/entries/10").json()["payload"]["content"] == "large " * 60_000
    assert service.http.get("/sessions/s/entries/99").status_code == 404
    lines = service.http.get("/sessions/s/transcript.jsonl").text.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, 13))


def test_a_session_tells_its_calls_its_kv_and_its_relatives(service: Service, start_peer: Callable[..., Peer]) -> None:
    register(service.database, start_peer(answering).address)
    make(service, {}, "s")
    call = {"kind": "tool_call", "call_id": "c1", "payload": {"name": "pytest", "expected_s": 2.0}}
    append(service, {}, "s", message("x"), call, {"kind": "tool_result", "call_id": "c1", "payload": {"error": "no"}})
    service.http.post("/v1/sessions/s/forks", json={"id": "f"}, headers={"If-Match": "*"}).raise_for_status()
    page = service.http.get("/sessions/s").text
    assert "<strong>failed</strong>" in page and "2.0 s" in page and '<rect class="call failed"' in page
    assert "It waits for a tool since 4.0 s." in page and "place 2" in page
    assert "64 from the host tier, 128 from the drive" in page and ">1.50<" in page, "GB/s of 3 MB in 2 ms"
    assert "0b.ext" in page and "&lt;i&gt;s" in page and "7 more are not shown" in page
    assert "agentstate sessions export s<" in page
    assert 'href="/sessions/f"' in page
    fork = service.http.get("/sessions/f").text
    assert 'href="/sessions/s"' in fork and "shares its history" in fork and "<strong>failed</strong>" in fork


def test_what_is_stored_for_an_engine_that_was_started_otherwise_is_told_apart(service: Service) -> None:
    make(service, {}, "s")
    with service.database.write() as connection:
        uid = connection.exec_driver_sql("SELECT id FROM sessions").scalar_one()
    for fingerprint, rank, several in (("f1", 0, False), ("f2", 1, False), ("f3", 1, True)):
        with service.database.write() as connection:
            manifests.save(connection, Manifest(uid, fingerprint, rank, "n", "e", 64, 64, b"k" * 32, 5000))
        page = service.http.get("/sessions/s").text
        assert fingerprint in page and ("Of rank 1 there are pages of several fingerprints" in page) == several
        assert "Of rank 0" not in page, "each rank has a fingerprint of its own"


def test_actions_ask_act_and_say_so(service: Service, start_peer: Callable[..., Peer]) -> None:
    peer = start_peer(answering)
    register(service.database, peer.address)
    headers = api(service, "mine")
    make(service, headers, "s")
    lease = append(service, headers, "s", message("one"), message("two"))
    suspend(service, headers, "s", lease)
    first = service.http.get("/v1/sessions/s/entries", headers=headers).json()["data"][0]["id"]
    operator = browser(service, "mine")
    confirm = operator.http.get("/sessions/s/do/delete").text
    assert "agentstate sessions rm s" in confirm and "forks" in confirm

    forked = operator.post(f"/sessions/s/do/fork?at={first}")
    fork_id = forked.headers["location"].removeprefix("/sessions/").partition("?")[0]
    assert len(service.http.get(f"/v1/sessions/{fork_id}/entries", headers=headers).json()["data"]) == 1
    assert operator.post(f"/sessions/s/do/rewind?at={first}").status_code == 303
    assert len(service.http.get("/v1/sessions/s/entries", headers=headers).json()["data"]) == 1

    assert operator.post("/sessions/s/do/pin", tier="host", hours="2").headers["location"] == "/sessions/s?done=pinned"
    assert operator.post("/sessions/s/do/pin", tier="host", hours="9999").status_code == 403
    assert operator.post("/sessions/s/do/unpin").status_code == 303
    for name in ("prefetch", "demote"):
        done = operator.post(f"/sessions/s/do/{name}").headers["location"]
        assert "operation=op_" in done
        assert "Operation <code>op_" in operator.http.get(done).text
    # The operations ask the engine once they are answered.
    until(lambda: {"pin", "demote"} <= {request["verb"] for request in peer.requests})

    stale = operator.http.get("/sessions/s/do/delete").text
    append(service, headers, "s", message("meanwhile"))
    old = dict(re.findall(r'name="(csrf|revision)" value="([^"]*)"', stale))
    refused = operator.http.post("/sessions/s/do/delete", data={**old, "typed": "s"}, headers=SAME)
    assert refused.status_code == 412, "it has changed since it was looked at"
    assert operator.post("/sessions/s/do/delete", typed="t").status_code == 403
    with service.database.write() as connection:
        connection.execute(sa.update(leases).values(expires_us=0))
    form = dict(re.findall(r'name="(csrf|revision)" value="([^"]*)"', operator.http.get("/sessions/s/do/delete").text))
    for _ in range(2):
        done_twice = operator.http.post("/sessions/s/do/delete", data={**form, "typed": "s"}, headers=SAME)
        assert done_twice.headers["location"] == "/sessions?done=deleted"
    assert service.http.get("/v1/sessions/s", headers=headers).status_code == 404
    assert operator.http.get("/sessions/s/do/nothing").status_code == 404


# --- engines, stores, tenants


def test_an_engine_that_stores_nothing_says_why(service: Service, start_peer: Callable[..., Peer]) -> None:
    peer = start_peer(
        lambda request: {**answering(request), **({"off": "its KV is FP4"} if request["verb"] == "stat" else {})}
    )
    engine = register(service.database, peer.address)
    for path in ("/", "/engines", f"/engines/{engine.id}"):
        assert "its KV is FP4" in service.http.get(path).text, path
    assert service.http.get("/engines/eng_none").status_code == 404
    assert "1.5 MB" in service.http.get("/stores").text


def test_an_engine_says_what_it_does_and_to_administrators_which_flags_it_has(
    service: Service, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.0)
    monkeypatch.setattr(snapshot, "STALE_S", 0.0)
    given = [
        {"flag": "--max-total-tokens 32768", "class": "tested", "why": "no effect on KV"},
        {"flag": f"--chat-template {EVIL}", "class": "unknown", "why": "not run with AgentState"},
    ]
    peer = start_peer(lambda request: {**answering(request), "flags": given})
    engine = register(service.database, peer.address, phase=Phase.PREFILL)
    page, listed = (service.http.get(path).text for path in (f"/engines/{engine.id}", "/engines"))
    assert "prefill" in page and "--max-total-tokens 32768" in page and "<strong>unknown</strong>" in page
    assert "&lt;script&gt;" in page and EVIL not in page
    assert ">prefill<" in listed and "1 tested, <strong>1 unknown</strong>" in listed
    operator = browser(service, "mine")
    for path in (f"/engines/{engine.id}", "/engines"):
        text = operator.http.get(path).text
        assert "prefill" in text and "max-total-tokens" not in text and "tested" not in text, path
    # One of an earlier release does not say them, and none may say what is no list of them.
    administrator = browser(service, "mine", Role.ADMIN)
    others: list[dict[str, Any]] = [{}, {"flags": "all"}, {"flags": [1]}]
    for said in others:
        peer.answer = lambda request, said=said: {**answering(request), **said}
        for path in (f"/engines/{engine.id}", "/engines"):
            assert administrator.http.get(path).status_code == 200, (path, said)


def test_an_engine_that_does_not_answer_is_told_of(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ASK_S", 0.05)
    engine = register(service.database, "tcp://127.0.0.1:1")
    text = service.http.get("/").text
    assert "does not answer" in text
    assert service.http.get(f"/engines/{engine.id}").status_code == 200


def test_an_engine_that_misses_a_question_is_not_said_to_be_silent_at_once(
    service: Service, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.0)
    monkeypatch.setattr(snapshot, "STALE_S", 0.0)
    monkeypatch.setattr(snapshot, "SILENT_S", 3600.0)
    peer = start_peer(answering)
    register(service.database, peer.address)
    assert "1.5 MB" in service.http.get("/").text
    monkeypatch.setattr(snapshot, "ASK_S", 0.05)
    peer.answer = lambda request: None
    text = service.http.get("/").text
    assert "1.5 MB" in text and "does not answer" not in text
    monkeypatch.setattr(snapshot, "SILENT_S", 0.0)
    text = service.http.get("/").text
    assert "1.5 MB" in text and "does not answer" in text


def test_an_administrator_makes_and_revokes_keys(service: Service) -> None:
    admin = browser(service, "mine", Role.ADMIN)
    made = admin.post("/tenants/keys", page="/tenants", tenant="other", role="viewer", note="a note")
    assert made.status_code == 200 and made.headers["cache-control"] == "no-store"
    secret = re.search(r"ags_[\w-]+", made.text)
    assert secret is not None and "agentstate keys create --tenant other --role viewer" in made.text
    headers = {"Authorization": f"Bearer {secret[0]}"}
    assert service.http.get("/v1/sessions", headers=headers).status_code == 200
    listing = admin.http.get("/tenants").text
    assert "a note" in listing and secret[0] not in listing
    for wrong in ({"tenant": "a b"}, {"tenant": "a", "role": "root"}):
        assert (
            admin.post("/tenants/keys", page="/tenants", **{"role": "viewer", "note": "", **wrong}).status_code == 403
        )
    with service.database.read() as connection:
        key_id = next(one.id for one in tenants.list_keys(connection) if one.tenant == "other")
    assert admin.post(f"/tenants/keys/{key_id}/revoke").headers["location"] == "/tenants?done=revoked"
    assert service.http.get("/v1/sessions", headers=headers).status_code == 401
    assert admin.http.get("/tenants/keys/key_none/revoke").status_code == 404


def test_assets_are_kept_for_good_under_names_of_their_content(service: Service) -> None:
    page = service.http.get("/").text
    urls = re.findall(r'(?:src|href)="(/console/assets/[^"]*)"', page)
    assert len(urls) == 4
    for url in urls:
        answer = service.http.get(url)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    assert service.http.get(f"{assets.PATH}console.css").status_code == 404


# --- the stream


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_the_stream_says_that_there_is_news_and_ends_with_the_key(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.02)
    looks = browser(service, "mine")
    with looks.http.stream("GET", "/console/stream") as response:
        assert response.headers["x-accel-buffering"] == "no" and "content-encoding" not in response.headers
        told = events(response)
        assert next(told) == ("hello", {"build": assets.BUILD})
        first, second = next(told), next(told)
        assert first[0] == second[0] == "news" and second[1]["number"] > first[1]["number"]
        with service.database.write() as connection:
            tenants.revoke_key(connection, tenants.list_keys(connection)[0].id)
        rest = list(told)
        assert rest[-1][0] == "signed-out" and all(kind == "news" for kind, _ in rest[:-1])
    for asked in ({"Accept": "text/event-stream"}, {"HX-Request": "true"}):
        assert looks.http.get("/console/stream", headers=asked).status_code == 401


def test_a_changed_role_ends_the_stream(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.02)
    looks = browser(service, "mine")
    with looks.http.stream("GET", "/console/stream") as response:
        told = events(response)
        next(told)
        with service.database.write() as connection:
            tenants.set_role(connection, tenants.list_keys(connection)[0].id, Role.VIEWER)
        assert list(told)[-1][0] == "signed-out"


def test_streams_end_with_the_service_and_cost_nothing_then(database_url: str, tmp_path: Path) -> None:
    with serving(Settings(home=tmp_path, database_url=database_url)) as service:
        client = httpx.Client(base_url=service.base_url, timeout=300)
        opened = client.stream("GET", "/console/stream")
        response = opened.__enter__()
        told = events(response)
        assert next(told)[0] == "hello"
        assert service.app.state.console.snapshots.watching == 1
    assert list(told)[-1][0] == "ending"
    opened.__exit__(None, None, None)
    assert service.app.state.console.snapshots.watching == 0


# --- the command line


def test_every_command_that_a_page_shows_is_one() -> None:
    def options(*words: str) -> set[str]:
        command: Any = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]
        return {option for parameter in command.params for option in parameter.opts}

    lines = [
        commands.prefetch("s", "host"),
        commands.demote("s"),
        commands.pin("s", "device", "2h"),
        commands.unpin("s"),
        commands.fork("s", "entry"),
        commands.rewind("s", None),
        commands.export("s"),
        commands.delete("s"),
        commands.create_key("t", "viewer"),
        commands.revoke_key("k"),
    ]
    for line in lines:
        program, *words = line.split()
        assert program == "agentstate"
        assert {word for word in words if word.startswith("--")} <= options(*words[:2]), line
    assert commands.delete("a b'; rm") == """agentstate sessions rm 'a b'"'"'; rm'"""

"""The console in a real Chromium: its policy, both themes, accessibility, the keyboard, and what is live.

With ``AGENTSTATE_TEST_PICTURES=DIRECTORY`` the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from stage import PATIENCE_S, Peer, Service, register, serving, stored
from tools import missing, tool

from agentstate.api import gate
from agentstate.api.console import snapshot
from agentstate.cli.local import free_port
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Role
from agentstate.settings import Settings
from agentstate.sql.models import session_turns, sessions

PICTURES = os.environ.get("AGENTSTATE_TEST_PICTURES")
PATIENCE_MS = 60_000
GIB = 1 << 30
MODEL = "Qwen/Qwen2.5-7B-Instruct"
# What a browser says that breaks the policy, and what fails in a script.
WATCH = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error("policy", event.violatedDirective, event.blockedURI));
"""
# Where in the window the entry is that somebody reads.
READ = "() => Math.round(document.querySelectorAll('.transcript > li')[2].getBoundingClientRect().top)"
FOCUSED = "() => document.activeElement.getAttribute('href') || document.activeElement.tagName"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no Playwright: install playwright")
    program = tool("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
            timeout=PATIENCE_MS,
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe() -> str:
    try:
        import axe_playwright_python
    except ImportError:
        missing("no axe: install axe-playwright-python")
    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


@pytest.fixture
def live(
    migrated_file: Path, tmp_path: Path, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    """A service with an engine and some agents, whose snapshots follow each other quickly."""
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.2)
    monkeypatch.setattr(snapshot, "ASK_S", PATIENCE_S)
    shutil.copy(migrated_file, tmp_path / "agentstate.db")
    peer = start_peer(said)
    settings = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path / 'agentstate.db'}", engine_timeout_s=3600)
    with serving(settings) as service:
        register(
            service.database,
            peer.address,
            id="eng_1",
            node="gpu-1",
            model=MODEL,
            fingerprint="9c41d07be2a55f03",
            shared_store="s3://kv/agents",
        )
        fill(service)
        yield service


def said(request: dict[str, Any]) -> dict[str, Any]:
    tiers = {"device": 0, "host": 12_288, "disk": 18_432}
    hits = {"tool": {"device": 410_000, "fetched": 95_000, "host": 40_000, "nvme": 160_000, "recomputed": 22_000}}
    answers: dict[str, dict[str, Any]] = {
        "stat": {
            "off": None,
            "flags": [
                {"flag": f"--model-path {MODEL}", "class": "tested", "why": "pages are kept apart by it"},
                {"flag": "--tp-size 2", "class": "tested", "why": "pages are kept apart by it"},
                {"flag": "--enable-two-batch-overlap", "class": "unknown", "why": "not run with AgentState"},
            ],
            "store": {"pages": 81_920, "extents": 640, "bytes": 120 * GIB, "bytes_written": 300 * GIB},
            "restore": {"restores": 1288, "pages_restored": 90_211, "bytes_read": 210 * GIB, "pages_failed": 0},
            "spill": {"pages_spilled": 88_000, "pages_failed": 0, "extents_merged": 31},
            "wear": {"bytes_day": 41 * GIB, "budget": 500 * GIB},
            "served": {
                "hits": {
                    gap: {tier: {"tokens": tokens, "requests": 10} for tier, tokens in of.items()}
                    for gap, of in hits.items()
                },
                "penalty": {"reads": {"seconds": 12.5, "requests": 91}},
            },
            "accounts": {
                "tenant default": {
                    "device": {"bytes": 9 * GIB, "limit": None},
                    "host": {"bytes": 20 * GIB, "limit": 40 * GIB},
                    "nvme": {"bytes": 120 * GIB, "limit": None},
                }
            },
        },
        "explain": {
            "tiers": {name: {"tokens": tokens, "bytes": tokens * 23_040} for name, tokens in tiers.items()},
            "wait": {"state": "waits", "kind": "tool", "waited_s": 4.2, "rest_p50_s": 3.1, "rest_p90_s": 11.8},
            "index": 0.21,
            "place": 3,
            "fetched_from_index": 0.5,
            "restores": [
                {
                    "id": 1_767_605_472_512_000,
                    "why": "request",
                    "tokens": {"host": 6_144, "nvme": 12_288},
                    "bytes": 18_432 * 23_040,
                    "seconds": 0.187,
                    "waited_s": 0.021,
                }
            ],
            "page_map": [
                {"first": first, "tokens": 6_144, "device": False, "host": first < 12_288, "extent": extent}
                | {"shared_extent": None if first else "9c41d07be2a55f03/7e.ext"}
                for first, extent in ((0, "00000000000002a1.ext"), (6_144, "00000000000002a7.ext"), (12_288, None))
            ],
        },
        "decisions": {"decisions": [], "more": False},
    }
    return {"ok": True, **answers[request["verb"]]} if request["verb"] in answers else stored("warm")


def fill(service: Service) -> None:
    for name in ("review-pull-request-412", "nightly-report", "support/ticket-9917"):
        service.http.post("/v1/sessions", json={"id": name, "model": MODEL}).raise_for_status()
    append(
        service,
        "review-pull-request-412",
        {"kind": "message", "payload": {"role": "user", "content": "Review pull request 412, and run its tests."}},
        {
            "kind": "tool_call",
            "call_id": "call_1",
            "payload": {"name": "shell", "arguments": {"command": "pytest -q"}, "expected_s": 0.01},
        },
        {"kind": "tool_result", "call_id": "call_1", "payload": {"output": "3 failed, 211 passed"}},
        {"kind": "message", "payload": {"role": "assistant", "content": "Three tests fail. I look at the first one."}},
    )
    service.http.post(
        "/v1/sessions/review-pull-request-412/forks", json={"id": "review-412-other-way"}, headers={"If-Match": "*"}
    ).raise_for_status()
    with service.database.write() as connection:
        uids = connection.exec_driver_sql("SELECT id FROM sessions ORDER BY id").scalars().all()
        for number, uid in enumerate(uids, 1):
            tokens = 64 * number
            manifests.save(
                connection,
                Manifest(uid, "9c41d07be2a55f03", 0, "gpu-1", "eng_1", 64, tokens, b"k" * 32 * number, tokens * 23_040),
            )


def append(service: Service, name: str, *entries: dict[str, Any]) -> None:
    path = f"/v1/sessions/{name}"
    lease = service.http.post(f"{path}/resume", json={}).raise_for_status().json()["lease"]
    proof = {"token": lease["token"], "epoch": lease["epoch"]}
    service.http.post(f"{path}/entries", json={"lease": proof, "entries": list(entries)}).raise_for_status()
    body = {"lease": proof, "reason": "tool_wait", "durable_timeout_ms": 0}
    service.http.post(f"{path}/suspend", json=body).raise_for_status()


@contextmanager
def tab(chromium: Any, service: Service, **options: Any) -> Iterator[Any]:
    """A page in a browser that nobody has used, which fails the test for whatever the browser complains of."""
    context = chromium.new_context(base_url=service.base_url, viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    context.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    if options.get("java_script_enabled", True):
        context.add_init_script(WATCH)
    page = context.new_page()
    page.complaints = complaints
    try:
        yield page
        assert [one for one in complaints if "ERR_" not in one] == []
    finally:
        context.close()


PAGES = {
    "overview": "/",
    "sessions": "/sessions",
    "session": "/sessions/review-pull-request-412",
    "fork": "/sessions/review-pull-request-412/do/fork",
    "pin": "/sessions/review-pull-request-412/do/pin",
    "delete": "/sessions/review-pull-request-412/do/delete",
    "engines": "/engines",
    "engine": "/engines/eng_1",
    "stores": "/stores",
    "tenants": "/tenants",
    "error": "/sessions/none",
}
SHOWN = ("overview", "sessions", "session", "engines", "engine", "stores", "tenants", "delete")


def take(page: Any, path: Path) -> None:
    """A picture of few colours, which is a third as large."""
    from PIL import Image

    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(160)
    small.save(path, optimize=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_accessible_and_keeps_to_its_policy(chromium: Any, axe: str, live: Service, theme: str) -> None:
    with live.database.write() as connection:
        admin = tenants.create_key(connection, "default", note="operations", role=Role.ADMIN).secret
    with tab(chromium, live, color_scheme=theme) as page:

        def check(name: str) -> None:
            page.evaluate(axe)
            found = page.evaluate("axe.run()")["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], name
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is too wide"
            if PICTURES and name in SHOWN:
                Path(PICTURES).mkdir(parents=True, exist_ok=True)
                take(page, Path(PICTURES) / f"console-{name}-{theme}.png")

        page.goto("/sessions")
        check("sign-in")
        page.get_by_label("API key").fill(admin)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/sessions")
        for name, path in PAGES.items():
            page.goto(path)
            check(name)
        page.goto("/tenants")
        page.get_by_role("link", name="Revoke").first.click()
        page.wait_for_url("**/revoke")
        check("revoke")
        page.goto("/")
        grounds = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
        page.locator("#theme").click()
        page.reload()
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"][:: 1 if theme == "light" else -1]
        page.complaints[:] = [one for one in page.complaints if "404" not in one]


def test_a_page_follows_what_happens_and_keeps_what_its_reader_did(chromium: Any, live: Service) -> None:
    with tab(chromium, live) as page:
        page.goto("/sessions/review-pull-request-412")
        page.locator("#metadata summary").click()
        page.locator("#metadata summary").focus()
        page.evaluate("document.getElementById('kv-h').marked = true")
        page.evaluate("document.getElementById('newest').scrollIntoView()")
        append(live, "review-pull-request-412", {"kind": "note", "payload": {"x": "something new"}})
        page.get_by_text("something new").wait_for()
        assert page.locator("#metadata").get_attribute("open") is not None
        assert page.evaluate("document.activeElement.textContent") == "Metadata"
        assert page.evaluate("document.getElementById('kv-h').marked"), "it is morphed, not replaced"


def test_a_transcript_does_not_move_under_who_reads_it(chromium: Any, live: Service) -> None:
    long = [
        {"kind": "message", "payload": {"role": "user", "content": f"line {number}\n" * 10}} for number in range(30)
    ]
    append(live, "nightly-report", *long)
    with tab(chromium, live) as page:
        page.goto("/sessions/nightly-report")
        page.locator(".transcript > li").nth(2).scroll_into_view_if_needed()
        there = page.evaluate(f"({READ})()")
        append(live, "nightly-report", {"kind": "note", "payload": {"x": "something new"}})
        page.get_by_role("button", name="Show 1 new").wait_for()
        assert page.get_by_text("something new").count() == 0
        # What is above it may have grown: a browser moves the page by as much, when it paints.
        page.wait_for_function(f"there => ({READ})() === there", arg=there)
        page.get_by_role("button", name="Show 1 new").click()
        page.get_by_text("something new").wait_for()
        page.wait_for_function(
            "() => document.querySelector('.transcript').lastElementChild.getBoundingClientRect().top < innerHeight"
        )
        append(live, "nightly-report", {"kind": "note", "payload": {"x": "at the end"}})
        page.get_by_text("at the end").wait_for()


def test_a_page_of_what_is_gone_says_so(chromium: Any, live: Service) -> None:
    with tab(chromium, live) as page:
        page.goto("/sessions/nightly-report")
        live.http.delete("/v1/sessions/nightly-report", headers={"If-Match": "*"}).raise_for_status()
        page.get_by_text("there is no session nightly-report").wait_for()
        page.complaints[:] = [one for one in page.complaints if "404" not in one]


def test_a_page_that_cannot_be_fetched_grows_old_though_there_is_news(chromium: Any, live: Service) -> None:
    with tab(chromium, live) as page:
        page.clock.install()
        page.goto("/engines")
        page.context.route("**/engines", lambda route: route.fulfill(status=503, body=""))
        page.wait_for_event("response", lambda response: response.status == 503)
        page.clock.fast_forward(20_000)
        page.get_by_text("Not live.").wait_for()
        page.wait_for_event("response", lambda response: response.status == 503)
        assert page.get_by_text("Not live.").is_visible()
        page.context.unroute("**/engines")
        page.get_by_text("Not live.").wait_for(state="hidden")
        page.complaints[:] = [one for one in page.complaints if "503" not in one]


def test_many_tabs_have_one_stream(chromium: Any, live: Service) -> None:
    heard = "() => { new BroadcastChannel('agentstate-console').onmessage = () => { window.heard = true; }; }"
    with tab(chromium, live) as first:
        tabs = [first, *(first.context.new_page() for _ in range(7))]
        for one in tabs:
            one.goto("/engines")
            one.evaluate(heard)
        for one in tabs[1:]:
            one.wait_for_function("() => window.heard")
        one_stream(live)
        tabs[0].close()
        for one in tabs[1:]:
            one.evaluate("() => { window.heard = false; }")
        for one in tabs[2:]:
            one.wait_for_function("() => window.heard")
        one_stream(live)


def one_stream(service: Service) -> None:
    """Until one is open: the service notices a moment later that a tab was closed."""
    deadline = time.monotonic() + PATIENCE_S
    while (open_ones := service.app.state.console.snapshots.watching) != 1:
        assert time.monotonic() < deadline, open_ones
        time.sleep(0.05)


def test_what_is_old_says_so_and_its_actions_are_off(chromium: Any, live: Service) -> None:
    with tab(chromium, live) as page:
        # The page's time goes on when the test says so, however long this machine takes.
        page.clock.install(time=0)
        page.clock.pause_at(1000)
        page.context.route("**/console/stream", lambda route: route.abort())
        page.goto("/sessions/nightly-report")
        pin = page.get_by_role("link", name="Pin", exact=True)
        assert pin.get_attribute("aria-disabled") is None
        page.clock.fast_forward(20_000)
        page.get_by_text("Not live.").wait_for()
        assert pin.get_attribute("aria-disabled") == "true"
        pin.dispatch_event("click")
        assert page.url.endswith("/sessions/nightly-report")
        page.context.unroute("**/console/stream")
        page.clock.resume()
        page.get_by_text("Not live.").wait_for(state="hidden")
        assert pin.get_attribute("aria-disabled") is None
        pin.click()
        page.wait_for_url("**/do/pin")


def test_a_page_goes_on_after_a_restart_of_the_service(
    chromium: Any, migrated_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.2)
    shutil.copy(migrated_file, tmp_path / "agentstate.db")
    settings = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path / 'agentstate.db'}")
    with ExitStack() as ending:
        port = free_port()  # nobody takes it while the service is away
        with serving(settings, port) as service:
            page = ending.enter_context(tab(chromium, service))
            page.goto("/sessions")
            page.evaluate("window.kept = true")
            service.http.post("/v1/sessions", json={"id": "before", "model": MODEL}).raise_for_status()
            page.get_by_role("link", name="before").wait_for()
        with serving(settings, port) as service:
            service.http.post("/v1/sessions", json={"id": "after", "model": MODEL}).raise_for_status()
            page.get_by_role("link", name="after").wait_for()
            assert page.evaluate("window.kept"), "it is the same page"


def test_the_keyboard_reaches_every_action(chromium: Any, live: Service) -> None:
    with tab(chromium, live) as page:
        page.goto("/sessions/nightly-report")
        wanted = set(page.eval_on_selector_all(".actions a", "all => all.map(one => one.getAttribute('href'))"))
        assert len(wanted) == 8
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(FOCUSED))
        assert seen[0] == "#main" and wanted <= set(seen)
        page.locator(".actions a", has_text="Delete").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/do/delete")
        page.get_by_label("Type the session's id").focus()
        page.keyboard.type("nightly-report")
        page.keyboard.press("Enter")
        page.wait_for_url("**/sessions?done=deleted")
        page.get_by_text("The session was deleted.").wait_for()
        assert live.http.get("/v1/sessions/nightly-report").status_code == 404


def test_a_revoked_key_closes_the_page(chromium: Any, live: Service) -> None:
    with live.database.write() as connection:
        made = tenants.create_key(connection, "default")
    with tab(chromium, live) as page:
        page.goto("/engines")
        page.get_by_label("API key").fill(made.secret)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Engines").wait_for()
        with live.database.write() as connection:
            tenants.revoke_key(connection, made.key.id)
        page.wait_for_url("**/sign-in**")
        page.complaints[:] = [one for one in page.complaints if "401" not in one]


@pytest.mark.parametrize(
    ("zone", "winter", "summer"),
    [
        ("Australia/Adelaide", "2026-01-15T22:30:00+10:30", "2026-07-15T21:30:00+09:30"),
        ("America/New_York", "2026-01-15T07:00:00-05:00", "2026-07-15T08:00:00-04:00"),
        ("America/St_Johns", "2026-01-15T08:30:00-03:30", "2026-07-15T09:30:00-02:30"),
        ("UTC", "2026-01-15T12:00:00Z", "2026-07-15T12:00:00Z"),
    ],
)
def test_times_are_those_of_the_viewers_zone(chromium: Any, live: Service, zone: str, winter: str, summer: str) -> None:
    first, second = "review-pull-request-412", "nightly-report"
    with live.database.write() as connection:
        for name, month in ((first, 1), (second, 7)):
            turned_us = round(datetime(2026, month, 15, 12, tzinfo=UTC).timestamp() * 1e6)
            mine = sa.select(sessions.c.id).where(sessions.c.name == name).scalar_subquery()
            connection.execute(
                sa.update(session_turns).where(session_turns.c.session_id == mine).values(turned_us=turned_us)
            )

    def shown(page: Any, name: str) -> str:
        return str(page.locator("tr", has=page.get_by_role("link", name=name)).locator("time").text_content())

    with tab(chromium, live, timezone_id=zone) as page:
        page.goto("/sessions")
        assert (shown(page, first), shown(page, second)) == (winter, summer)
        said = page.locator("#zone").text_content()
        assert zone in said if zone != "UTC" else said == "all times are UTC"
        # Of what was fetched anew, too.
        live.http.post("/v1/sessions", json={"id": "made-meanwhile", "model": MODEL}).raise_for_status()
        page.get_by_role("link", name="made-meanwhile").wait_for()
        assert (shown(page, first), shown(page, second)) == (winter, summer)
    with tab(chromium, live, timezone_id=zone, java_script_enabled=False) as page:
        page.goto("/sessions")
        assert shown(page, first) == "2026-01-15T12:00:00Z"
        assert page.locator("#zone").text_content() == "all times are UTC"


def test_everything_but_what_is_live_works_without_scripts(chromium: Any, live: Service) -> None:
    with tab(chromium, live, java_script_enabled=False) as page:
        page.goto("/sessions?state=suspended")
        page.get_by_role("link", name="review-pull-request-412").click()
        page.get_by_role("link", name="Fork", exact=True).click()
        page.get_by_role("button", name="Fork").click()
        page.get_by_text("The fork was made. This is it.").wait_for()
        assert page.locator("noscript p").is_visible()

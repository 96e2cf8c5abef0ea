"""`agentstate engine --check`: the class of every flag of a command line, without loading a model; and docs/flags.md.

`python -m engine_patch.flag_report [SGLang's flags]`, or `--write FILE` for the document.
"""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from engine_patch import flags, versions
from engine_patch import sglang_api as sgl
from engine_patch.flags import Flag, Standing

_WIDTH = 80
# So much of a flag with its value is in one line.
_VALUES = 30
_WRITE = "--write"


def check(arguments: list[str]) -> int:
    """Print where each flag that is given stands. The exit code: 1 when one is refused, 2 when SGLang does not
    understand them."""
    complaint = io.StringIO()
    # As the plug-in does before a start.
    sgl.add_attention_backend_choices([flags.CPU_ATTENTION])
    try:
        with contextlib.redirect_stderr(complaint):
            given = sgl.given_flags(sgl.parse_arguments(arguments))
    except SystemExit:
        print(complaint.getvalue().strip().rpartition("\n")[2], file=sys.stderr)
        return 2
    except Exception as error:
        # Of a configuration file, or of a value that only looks right: a start would end with a traceback.
        print(f"SGLang does not understand these flags: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _print(given)
    for sentences in (flags.refusal(given), flags.untested(given)):
        if sentences is not None:
            print("\n".join(textwrap.fill(sentence, _WIDTH) for sentence in sentences.splitlines()))
    return 1 if any(flag.standing is Standing.REFUSED for flag in given) else 0


def _print(given: list[Flag]) -> None:
    # A flag's name is copied.
    longest = max((len(flags.spelling(flag.field)) for flag in given), default=0)
    table = Table(Column("flag", overflow="fold", width=max(longest, _VALUES)), "class", "why")
    for flag in given:
        table.add_row(flags.shown(flag), flag.standing.value, flag.why)
    Console(width=_WIDTH, highlight=False, markup=False, emoji=False).print(table)


def document() -> str:
    """docs/flags.md."""
    fields = sgl.flag_defaults(sgl.server_args_class())
    unknown = [field for field in fields if not flags.known(field)]
    return "\n".join(
        [
            "# Flags of SGLang",
            "",
            *_filled(
                f"SGLang {versions.PINNED} takes {len(fields)} settings. `agentstate engine --check FLAGS` prints "
                "where the ones you give stand, without loading a model, and exits with 1 if one is refused. The "
                "start logs the same. A flag at its default is not given. This page is written by `python -m "
                "engine_patch.flag_report --write docs/flags.md` from the table in `engine_patch/flags.py`."
            ),
            "",
            "## Tested",
            "",
            "| flag | values | |",
            "|---|---|---|",
            *(
                f"| `{flags.spelling(field)}` | {_values(tested.values) if tested.values else 'any'} | {tested.note} |"
                for field, tested in flags.TESTED.items()
            ),
            "",
            *_filled(
                "Where `--page-size` is not given, pages have 64 tokens on CUDA and on a CPU, unless the model, its "
                "attention, `--chunked-prefill-size` or NGRAM's trees need another size; NGRAM drafts trees unless "
                "`--speculative-ngram-max-bfs-breadth` is 1. SGLang's own default is 1, which costs CPU time and room "
                "a token; the start warns of it. Beam search, and models whose attention needs pages of "
                "one token and says so only once they are loaded, need `--page-size 1`."
            ),
            "",
            "These are part of what a page is valid for. Another value is another store:",
            "",
            *_listed(flags.IDENTITY.split()),
            "",
            "These have no effect on KV, by reading SGLang:",
            "",
            *_grouped(flags.NO_EFFECT),
            "",
            "These do nothing without a flag that is refused:",
            "",
            *_grouped({f"`{flags.spelling(owner)}`": names for owner, names in flags.INERT.items()}),
            "",
            "## Refused",
            "",
            "The start ends with one sentence.",
            "",
            "| flag | values | reason | instead |",
            "|---|---|---|---|",
            *(
                f"| `{flags.spelling(field)}` | {_values(refusal.values) if refusal.values else 'all'} | "
                f"{refusal.reason} | {refusal.instead} |"
                for field, refusal in flags.REFUSED.items()
            ),
            "",
            "## Unknown",
            "",
            *_filled(
                "Nobody has run these with AgentState, and values of the tested ones that are not listed above. The "
                "start warns once and names them. A model that keeps what AgentState does not know is served all the "
                "same, and nothing of it is stored: the log and `stat` say so."
            ),
            "",
            "Pages are shared with engines that do not have them, since KV is the same but for rounding:",
            "",
            *_listed(field for field in unknown if flags.keeps_kv(field)),
            "",
            "Pages are kept apart from those of engines that do not have them:",
            "",
            *_listed(field for field in unknown if not flags.keeps_kv(field)),
            "",
        ]
    )


def _values(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in sorted(map(str, values)))


def _grouped(groups: Mapping[str, str]) -> Iterator[str]:
    """A list of groups, with the names that are in each."""
    for group, names in groups.items():
        yield f"- {group}:"
        yield from ("  " + line for line in _listed(names.split()))


def _listed(fields: Iterable[str]) -> list[str]:
    return _filled(" ".join(f"`{flags.spelling(field)}`" for field in fields))


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False)


def main(arguments: list[str]) -> int:
    if arguments[:1] == [_WRITE]:
        Path(arguments[1]).write_text(document())
        return 0
    return check(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

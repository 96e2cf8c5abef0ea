"""What commands print as JSON, held against the fields that `agentstate.cli.fields` says."""

from __future__ import annotations

from typing import Any

from agentstate.cli.fields import FIELDS

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def undocumented(command: str, printed: Any) -> list[str]:
    """What in ``printed`` is not as it says: fields that are not listed, listed ones that are missing unless only some
    objects have them, and values of another type. A list must not be empty: it would show nothing."""
    if command.endswith("[]"):
        assert isinstance(printed, list) and printed
        return [wrong for row in printed for wrong in _wrong("", row, command)]
    return _wrong("", printed, command)


def checked(command: str, printed: Any) -> Any:
    """``printed``, which is as it says, or an empty list."""
    name = f"{command}[]" if isinstance(printed, list) else command
    assert printed == [] or undocumented(name, printed) == []
    return printed


def _wrong(prefix: str, of: dict[str, Any], command: str) -> list[str]:
    fields = {name: kind for name, (kind, _) in FIELDS[command].items()}
    here = {name[len(prefix) :]: kind for name, kind in fields.items() if name.startswith(prefix)}
    own = {name: kind for name, kind in here.items() if "." not in name}
    nested = {name.partition("[].")[0] for name in here if "[]." in name}
    wrong = [f"{prefix}{name} is not listed" for name in of.keys() - own.keys() - nested]
    for name, kind in own.items():
        types, _, condition = kind.partition(";")
        if name not in of:
            wrong += [] if condition else [f"{prefix}{name} is missing"]
        elif not any(_is(of[name], TYPES[one.strip()]) for one in types.split(" or ")):
            wrong.append(f"{prefix}{name} is {of[name]!r}, not {types}")
    for name in nested:
        wrong += [] if name in of else [f"{prefix}{name} is missing"]
        wrong += [each for row in of.get(name, ()) for each in _wrong(f"{prefix}{name}[].", row, command)]
    return wrong


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (types == (bool,) or not isinstance(value, bool))

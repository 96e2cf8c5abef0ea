"""What a command line is known by."""

from __future__ import annotations

import re

_SCANNED_CHARACTERS = 2000
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_WRAPPERS = {"sudo", "env", "nohup", "time", "exec", "command", "nice", "timeout"}
_OF_A_WRAPPER = re.compile(r"-.*|[\d.]+[smhd]?")
_WITH_VERBS = {"git", "go", "npm", "npx", "pnpm", "yarn", "cargo", "docker", "kubectl", "make", "uv", "pip", "poetry"}
_WORD = re.compile(r"[\w.+-]{1,40}")


def head(command: str) -> str:
    """The program that a shell command spends its time in, as far as its first words tell: the first one after changes
    of directory, assignments and wrappers such as `timeout 60`; of programs such as git with their verb (`git diff`).
    Never an argument. Empty if the line begins with anything else.
    """
    for part in re.split(r"&&|\|\||[;|\n]", command[:_SCANNED_CHARACTERS]):
        words = part.split()
        if not words or words[0] in ("cd", "pushd", "export", "set", "source") or words[0].startswith("#"):
            continue
        while words and (_ASSIGNMENT.match(words[0]) or words[0] in _WRAPPERS):
            wrapper = words.pop(0)
            while wrapper in _WRAPPERS and words and _OF_A_WRAPPER.fullmatch(words[0]):
                words.pop(0)
        if not words:
            continue
        program = words[0].rpartition("/")[2]
        if not _WORD.fullmatch(program):
            return ""
        verb = words[1] if len(words) > 1 and program in _WITH_VERBS else ""
        return f"{program} {verb}" if re.fullmatch(r"[a-z][a-z-]{0,19}", verb) else program
    return ""

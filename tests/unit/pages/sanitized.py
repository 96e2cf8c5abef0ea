"""`python sanitized.py EXTENSION TEST…`: run tests with another build of the native extension."""

from __future__ import annotations

import importlib.util
import sys

import pytest

NAME = "agentstate.pages.native._native"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(NAME, sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    from agentstate.pages import native

    assert native.library is module
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))

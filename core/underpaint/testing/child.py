"""Runs a few lines in a fresh Python process that knows the plugin under test."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

from underpaint.registration.manager import PluginRecord

__all__ = ["run_child"]

_PREAMBLE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager, reset_manager
plugin, extra, arguments = json.loads(sys.argv[1])
manager = PluginManager(Switches(only=(plugin,), extra=tuple(extra)))
reset_manager(manager)
"""


@functools.cache
def _run(code: str, plugin: str, extra: tuple[str, ...], arguments: str, path: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + code, json.dumps([plugin, extra, json.loads(arguments)])],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise AssertionError(f"A fresh process ended with exit code {done.returncode}: {last}")
    return done.stdout


def run_child(code: str, record: PluginRecord, *arguments: str) -> Any:
    """Run code in a fresh process that has loaded one plugin alone, and return what it printed as JSON.

    Args:
        code: Python source; it finds the loaded `manager` and the list `arguments`.
        record: The plugin.
        *arguments: Texts for the code.

    Raises:
        AssertionError: The process failed.
    """
    extra = () if record.distribution else (record.origin,)
    # An equal call gives an equal answer, so that the many names of one plugin cost one process.
    printed = _run(code, record.name, extra, json.dumps(arguments), os.pathsep.join(p for p in sys.path if p))
    return json.loads(printed.splitlines()[-1])

"""Starts `child.py`: one engine, one model, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from onnxjit.bench.measure import reason


class ChildError(RuntimeError):
    """The process failed; the message is the end of what it said."""


def child(engine: str, model: str, inputs: str, threads: int, cache: Path) -> dict[str, Any]:
    """What the process answers (see `child.py`), with `seconds` from its start to its first line,
    which is printed when it has its first output."""
    environment = {**os.environ, "ONNXJIT_CACHE": str(cache), "ORT_DISABLE_TELEMETRY": "1"}
    script = str(Path(__file__).with_name("child.py"))
    command = [sys.executable, script, engine, model, inputs, str(threads)]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        seconds = time.perf_counter() - begin
        last = process.stdout.readline()
        said = process.stderr.read()
    if process.returncode:
        raise ChildError(reason(RuntimeError(said), model))
    return {**json.loads(last), "seconds": seconds}

"""Times engines against each other on one model, and onnxjit's kernels against the machine.

`engines` has the adapters, `turns` the clock, `measure` one fair comparison, `against` verdicts,
`roofline` and `kernels` what the machine can do and what each kernel makes of it, `plots`, `page`
and `trace` the pictures. `onnxjit bench` and `python -m benchmarks` are made of these.
"""

from onnxjit.bench.engines import (
    ENGINES,
    Call,
    Engine,
    Feeds,
    Loaded,
    Unsupported,
    engine_version,
    load_onnxjit,
    load_onnxruntime,
    load_openvino,
)
from onnxjit.bench.inputs import random_inputs
from onnxjit.bench.turns import Timing, settle, take_turns

__all__ = [
    "ENGINES",
    "Call",
    "Engine",
    "Feeds",
    "Loaded",
    "Timing",
    "Unsupported",
    "engine_version",
    "load_onnxjit",
    "load_onnxruntime",
    "load_openvino",
    "random_inputs",
    "settle",
    "take_turns",
]

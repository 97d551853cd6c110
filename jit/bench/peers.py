"""Adapters of engines that are compared where they are installed: tract, IREE, TVM and PyTorch.

Most of them want every size fixed: they get a copy of the model with the sizes of the inputs, and
are compiled when these are known.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onnxjit.bench.engines import Call, Feeds, Loaded, Unsupported


def load_tract(path: str, threads: int) -> Loaded:
    """tract, whose Python package runs on one thread and has no setting for more."""
    import tract

    if threads != 1:
        raise Unsupported("its Python package runs on one thread and has no setting for more")

    def bind(feeds: Feeds) -> Call:
        with _fixed(path, feeds) as (file, names):
            loaded = tract.onnx().load(file)
            for number, name in enumerate(names):
                array = feeds[name]
                dtype = _TRACT_DTYPES.get(array.dtype.name)
                if dtype is None:
                    raise Unsupported(f"no inputs of {array.dtype} from Python")
                fact = ",".join([*map(str, array.shape), dtype])
                loaded.set_input_fact(number, fact)
            runnable = loaded.into_model().into_runnable()
        arrays = [np.ascontiguousarray(feeds[name]) for name in names]
        return lambda: [tensor.to_numpy() for tensor in runnable.run(arrays)]

    return Loaded(bind, _output_names(path), None)


_TRACT_DTYPES = {"float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32", "int8": "i8",
                 "uint8": "u8", "bool": "bool"}  # fmt: skip


def load_iree(path: str, threads: int) -> Loaded:
    """IREE: its ONNX importer, the LLVM back end for this processor, and its Python runtime."""
    from iree import compiler, runtime

    def bind(feeds: Feeds) -> Call:
        with _fixed(path, feeds) as (file, names):
            text = subprocess.run(
                [sys.executable, "-m", "iree.compiler.tools.import_onnx", file,
                 "--opset-version", "17"],
                capture_output=True, text=True, env=_with_path(),
            )  # fmt: skip
        if text.returncode:
            raise Unsupported(f"its importer fails: {_last_line(text.stderr)}")
        binary = compiler.compile_str(
            text.stdout,
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
        driver = "local-sync"
        if threads > 1:
            runtime.flags.parse_flags(f"--task_topology_max_group_count={threads}")
            driver = "local-task"
        config = runtime.Config(driver)
        module = runtime.VmModule.copy_buffer(config.vm_instance, binary)
        loaded = runtime.load_vm_module(module, config)
        main = loaded[_function_name(text.stdout)]
        arrays = [runtime.asdevicearray(config.device, feeds[name]) for name in names]

        def call() -> Sequence[Any]:
            result = main(*arrays)
            several = isinstance(result, (list, tuple))
            return [r.to_host() for r in (result if several else [result])]

        return call

    return Loaded(bind, _output_names(path), None)


def load_tvm(path: str, threads: int) -> Loaded:
    """TVM's Relax front end and its usual pipeline for this processor, without tuning."""
    # Read when TVM first makes its threads; a later change has no effect in one process.
    before = os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    if before != str(threads):
        raise Unsupported(f"its threads were set to {before} before in this process")
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    def bind(feeds: Feeds) -> Call:
        with _fixed(path, feeds) as (file, names):
            shapes = {name: list(feeds[name].shape) for name in names}
            module = from_onnx(onnx.load(file), shape_dict=shapes, keep_params_in_input=False)
        target = tvm.target.Target.from_device(tvm.cpu())
        machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
        arrays = [tvm.runtime.tensor(feeds[name]) for name in names]
        main = machine["main"]

        def call() -> Sequence[Any]:
            result = main(*arrays)
            return [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]

        return call

    return Loaded(bind, _output_names(path), None)


def load_torch(path: str, threads: int, compiled: bool = False) -> Loaded:
    """PyTorch on the module that onnx2torch makes of the model, eager or through inductor."""
    import onnx2torch
    import torch

    torch.set_num_threads(threads)
    module = onnx2torch.convert(path).eval()
    if compiled:
        module = torch.compile(module)
    names = _input_names(path)

    def bind(feeds: Feeds) -> Call:
        arrays = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in names]

        def call() -> Sequence[Any]:
            with torch.inference_mode():
                result = module(*arrays)
            return [t.numpy() for t in (result if isinstance(result, (list, tuple)) else [result])]

        return call

    return Loaded(bind, _output_names(path), module, "by way of onnx2torch")


def load_torch_compiled(path: str, threads: int) -> Loaded:
    """`load_torch` with `torch.compile`."""
    return load_torch(path, threads, compiled=True)


@contextmanager
def _fixed(path: str, feeds: Feeds) -> Iterator[tuple[str, list[str]]]:
    """A file with the model, its inputs of the sizes of `feeds` and no other sizes stated; and the
    names of its inputs in order. The file is gone when the context ends. The ranks of outputs stay,
    which a checker may ask for."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    constants = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in constants]
    for value in inputs:
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in feeds[value.name].shape:
            shape.dim.add().dim_value = size
    # What the file says of other values holds for its own sizes.
    del graph.value_info[:]
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    if model.ByteSize() >= 1 << 31:
        raise Unsupported("the model with its weights exceeds 2 GiB, the limit of one file")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        onnx.save(model, file)
        yield file, [value.name for value in inputs]


def _input_names(path: str) -> list[str]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    return [v.name for v in graph.input if v.name not in constants]


def _output_names(path: str) -> tuple[str, ...]:
    import onnx

    return tuple(v.name for v in onnx.load(path, load_external_data=False).graph.output)


def _with_path() -> dict[str, str]:
    """The environment for a Python process that finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _function_name(text: str) -> str:
    """The name of the function that a text of MLIR defines."""
    return text.partition("func.func @")[2].partition("(")[0].strip('"')

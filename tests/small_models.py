"""Builds the small models that the importer is tested with."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

FLOAT = TensorProto.FLOAT


def info(name, shape=("n", 3), dtype=FLOAT):
    """A ValueInfoProto of a tensor."""
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes, inputs=None, outputs=None, initializers=(), ir=10, imports=None, **fields):
    """A model of `nodes`; from x to y, both float32[n, 3], unless it says otherwise."""
    made = helper.make_graph(
        nodes,
        "g",
        [info("x")] if inputs is None else inputs,
        [info("y")] if outputs is None else outputs,
        list(initializers),
        **fields,
    )
    imports = [helper.make_opsetid(*item) for item in imports or [("", 18)]]
    return helper.make_model(made, ir_version=ir, opset_imports=imports)


def weight(name="w", shape=(64, 64), dtype=np.float32):
    """A TensorProto that counts up from 0; large enough to be taken out before parsing."""
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return numpy_helper.from_array(values, name)


def run(model, *arrays):
    """What the ONNX reference evaluator computes."""
    names = [value.name for value in model.graph.input]
    return ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))


# Functions in functions, with a subgraph, attribute references and several opsets.
FUNCTIONS = """
    <ir_version: 10, opset_import: ["": 18, "local": 1]>
    g (float[M,N] x) => (float[M,N] y, float[M,N] z, float[M,N] p) {
        y = local.outer <scale = 3.0> (x)
        t = local.outer (y)
        z, p = local.two (t, x)
    }
    <opset_import: ["": 18], domain: "local">
    inner (a) => (b) {
        c = ReduceSum <keepdims = 0> (a)
        zero = Constant <value_float = 0.0> ()
        flag = Greater (c, zero)
        b = If <then_branch = then () => (y) { t = Neg (a) y = Exp (t) },
                else_branch = other () => (y) { y = Exp (a) }> (flag)
    }
    <opset_import: ["": 18], domain: "local">
    two (a, b, c) => (first, b) {
        first = Clip (a, c)
    }
    <opset_import: ["": 12, "local": 1], domain: "local">
    outer <scale: float = 2.0, missing> (a) => (b) {
        k = Constant <value_float: float = @scale> ()
        t = local.inner (a)
        s = Softmax <axis: int = @missing> (t)
        b = Mul (s, k)
    }
"""

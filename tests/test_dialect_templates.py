"""IR made through a template is the IR of the kernel's own source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx.backend.test
import pytest
import test_golden
from numba.core.errors import TypingError

from onnxjit.codegen import dialect, dialect_templates
from onnxjit.codegen.build import Source
from onnxjit.codegen.dialect_templates import compile_ir, template
from onnxjit.codegen_calls import generate
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
BODY = """
def kernel(ptrs, ints, scratch, begin, end):
    x = buffer_{dtype}(ptrs, 0)
    y = buffer_{dtype}(ptrs, 1)
    for i in range(begin, end):
        {line}
"""
CALLS = """
def kernel(ptrs, ints, scratch, begin, end):
    x = buffer_float32(ptrs, 0)
    z = stack_int64({n}, 1)
    for i in range(begin, end, {n}):
        {first}(x, i*{n}, 7, z, 0, 1, 9, x, i*{n}, x, 3, 16, 0, x, i*{n} + 5)
        {second}(x, i*{n}, 7, z, 0, 1, 9, x, i*{n}, x, 3, 16, 0, x, i*{n} + 5)
"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    dialect_templates._compiled.clear()
    yield
    dialect_templates._compiled.clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that Numba is given."""
    seen: list[str] = []
    compile_ = dialect.compile_ir

    def spy(source: str, symbols: Iterable[str] = (), filename: str = "") -> str:
        seen.append(source)
        return compile_(source, symbols, filename)

    monkeypatch.setattr(dialect_templates.dialect, "compile_ir", spy)
    return seen


def renamed(text: str) -> str:
    """IR whose local names are numbers: Numba makes them of positions in the bytecode."""
    names: dict[str, str] = {}
    text = re.sub(r"^([\w.$]+):", r'%"\1":', text, flags=re.MULTILINE)
    return re.sub(r'%"[^"]*"', lambda name: names.setdefault(name[0], f"%{len(names)}"), text)


def check(source: str, symbols: Iterable[str] = ()) -> None:
    direct = dialect.compile_ir(source, symbols)
    assert renamed(compile_ir(source, symbols)) == renamed(direct)


def body(line: str, dtype: str = "float32") -> str:
    return BODY.format(line=line, dtype=dtype)


def sources(data: bytes) -> list[Source]:
    program = run_pipeline(import_model(data), test_golden.TARGET)
    return generate(program, test_golden.TARGET).sources


@pytest.mark.parametrize("name", test_golden.MODELS)
def test_golden_kernels(name: str) -> None:
    for source in sources(test_golden.MODELS[name].SerializeToString()):
        check(source.text, source.symbols)


@pytest.mark.parametrize("name", ["light_squeezenet", "light_shufflenet"])
def test_kernels_of_a_network(name: str) -> None:
    distinct = {s.text: s for s in sources((LIGHT / f"{name}.onnx").read_bytes())}
    for source in distinct.values():
        check(source.text, source.symbols)
    assert len(dialect_templates._compiled) < 0.8 * len(distinct)
    assert None not in dialect_templates._compiled.values()


@pytest.mark.parametrize(
    "line",
    [
        "y[i*{0} + 1] = x[{0}]",
        "y[i] = x[i*{0} - (3 + {0}) + 2*{0}]",
        "y[i] = x[-{0} - i*-{0}]",
        "y[i % {0} + i // {0}] = x[umod_(i, {0}) + udiv_(i, {0})]",
        "y[i] = x[max_(min_({0}, i), -{0})]",
        "y[i] = select({0} < i, x[i], float32(2.5)) + select(i == 3, {0}, 1)",
        "for k in range(i, {0}, 2): y[k] = x[k]",
        "for k in range({0}, 0, -{0}): y[k] = x[k]",
        "for k in range(1, i, {0}): y[k] = x[k]*{0}",
        "y[i] = scratch_float32(scratch, {0}*64, 2)[i]",
        "y[i] = stack_float32({0}, 2)[i]",
        "zero(offset(y, {0}), {0} + i)",
        "copy(y, offset(x, i), {0})",
        "y[i] = x[max_(i, -9223372036854775808)] * {0}",
        "y[i] = pow_(x[i]*{0}, 2) + abs_(x[-i + {0}])",
        "y[i] = floordiv(x[i], {0}) + mod_floor(i, {0}) + isnan(i)*{0}",
    ],
)
def test_numbers_are_put_in(line: str, compilations: list[str]) -> None:
    made = {template(body(line.format(n))) for n in (2, 3, 7, 300, 2**31 + 5)}
    assert len({t.text for t in made if t}) == 1
    for n in (2, 3, 7, 300, 2**31 + 5):
        check(body(line.format(n)))
    check(body(line.format(1)))
    through = [text for text in compilations if "40000000" in text]
    assert 1 <= len(through) <= 2  # 1 may have a template of its own


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "bool", "uint64", "float64"])
def test_a_literal_takes_the_other_type(dtype: str) -> None:
    for n in (2, 200, 70000):
        check(body(f"y[i] = select(x[i] < {n}, x[i]*{n}, max_(x[i], -{n}))", dtype))


@pytest.mark.parametrize(
    "line",
    [
        "y[i] = x[i << {0}]",
        "y[i] = int32({0})",
        "y[i] = stack_float32(4, {0})[i]",
        "y[i] = buffer_float32(ptrs, {0})[i]",
        "y[i] = buffer_float32(ptrs, 1, {0})[i]",
    ],
)
def test_numbers_elsewhere_stay(line: str) -> None:
    for n in (2, 3):
        source = body(line.format(n) + "*1")
        made = template(source)
        assert made is not None and n not in made.numbers
        check(source)


def test_a_variable_keeps_its_literal() -> None:
    """Its type is the literal's where all are equal, and adapts to other operands."""
    for a, b in ((3, 3), (3, 4)):
        line = f"k = {a} if i < 2 else {b}\n        y[i] = x[i] * k"
        check(body(line, "uint8"))
    source = body("k = 5\n        s = stack_uint8(k, 2)\n        y[i] = s[i*3]", "uint8")
    assert template(source).numbers == (3,)  # type: ignore[union-attr]
    check(source)


@pytest.mark.parametrize(
    "line",
    [
        "y[i] = x[i + 7 // 2]",
        "y[i] = x[~(i - (9 % 4))]",
        "y[i] = x[i]*(3 < 5)",
    ],
)
def test_what_python_computes_itself(line: str) -> None:
    check(body(line))
    check(body(line))


def test_a_number_like_a_marker_is_compiled_directly() -> None:
    assert template(body("y[i] = x[i + 4000000000007]")) is None
    assert template(body("y[i*3] = float64(4000000000000007)")) is None
    assert template(body("y[i*3] = x[i] # café")) is None
    assert template(body("y[i*3] = x[")) is None
    assert template("") is None
    check(body("y[i*3] = float64(4000000000000007.0) + float64(0.4000000000000007)", "float64"))


def test_code_beside_the_kernel_sees_no_markers() -> None:
    source = body("y[i*3] = x[i]")
    assert template('"""Text."""\n' + source) is not None
    assert template("for k in range(9): pass\n" + source) is None
    assert template("FASTMATH = ()\n" + source) is None
    assert template(source + "\nn = [3][0]\n") is None
    assert template("def decorate(f): return f\n@decorate" + source) is None
    check("FASTMATH = ()\n" + source)
    check(body("y[i*3] = \f x[i + 4]"))


def test_a_changed_marker_is_noticed_once(
    compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dialect_templates._ARGUMENTS, "abs_", range(1))
    monkeypatch.setattr(dialect_templates, "literal", lambda node: getattr(node, "value", None))
    for n in (3, 5):
        check(body(f"y[i] = x[i + {n}*{n}]"))
    assert sum("40000000" in text for text in compilations) == 1
    assert list(dialect_templates._compiled.values()) == [None]


def test_micro_kernels_are_put_in(compilations: list[str]) -> None:
    six, four = "gemm_f32_6x16_avx2", "gemm_f32_4x16_avx2"
    for first, second in ((six, four), (four, six), (four, four)):
        symbols = sorted({first, second})
        source = CALLS.format(first=first, second=second, n=len(first) + len(compilations))
        check(source, symbols)
    with pytest.raises(ValueError, match="no micro-kernel family"):
        compile_ir(source, ["gemm_unknown"])
    through = [text for text in compilations if "40000000" in text]
    assert len(through) == 3  # of two micro-kernels, of one, of none that is known


def test_a_source_may_have_names_like_ours() -> None:
    source = CALLS.format(first="gemm_f32_6x16_avx2", second="gemm_f32_6x16_avx2", n=5)
    check(source.replace("z", "external_0"), ["gemm_f32_6x16_avx2"])


def test_a_refused_kernel_shows_its_own_text() -> None:
    with pytest.raises(TypingError, match="no_such_name"):
        compile_ir(body("y[i] = no_such_name(x[i*3])"), (), "<mine>")


def test_few_templates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect_templates, "_KEPT", 2)
    for count in range(4):
        check(body("y[i] = x[i*3" + " + i*5" * count + "]"))
    assert len(dialect_templates._compiled) == 2

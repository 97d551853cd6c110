"""The language of the plan executor against Python's own meaning of the same text."""

import ctypes

import llvmlite.binding as llvm
import pytest

from onnxjit.codegen.target import host, target_machine
from onnxjit.codegen.word_compiler import compile_words
from onnxjit.runtime.link import link

SOURCE = '''
LIMIT = 7


def helper(a, b):
    """A function of the text that others call."""
    if a > b:
        return a - b
    return b // 3


def arithmetic(a, b):
    c = a * 3 - (b << 2) + (a >> 1)
    c += helper(a, b)
    return (c & 255 | 1024) ^ min(a, b)


def division(a, b):
    return -a // b


def truth(a, b):
    found = a > 2 and b // a > 1 or not b
    if found and a != LIMIT:
        return found + 10
    elif a == LIMIT or b == LIMIT:
        return 5
    return a < b


def loops(a, b):
    total = 0
    for i in range(a):
        if i == 3:
            continue
        for j in range(i, b):
            if j > 20:
                break
            total += i * j
    while True:
        total -= 1
        if total & 15 == 0:
            break
    return total


def nothing(a, b):
    a = b
'''
NAMES = ("arithmetic", "division", "truth", "loops", "nothing")
PAIRS = [(a, b) for a in (0, 1, 2, 3, 7, 12) for b in (0, 1, 2, 7, 9, 40)]


@pytest.fixture(scope="module")
def code():
    target = host()
    module = compile_words(SOURCE, {name: f"w_{name}" for name in NAMES}, {}, target.triple)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    library = link([bytes(target_machine(target).emit_object(parsed))])
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return library, {name: kind(library.address(f"w_{name}")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_it_means_what_python_means(code, name):
    namespace = {}
    exec(SOURCE, namespace)
    for a, b in PAIRS:
        if name == "division" and b == 0:
            continue
        assert code[1][name](a, b) == int(namespace[name](a, b) or 0), (a, b)


def test_only_the_asked_functions_are_external(code):
    assert set(code[0].symbols) == {f"w_{name}" for name in NAMES}


@pytest.mark.parametrize(
    "body",
    ["return a / 2", "return b", "x = [a]", "import os", "return a < 1 < 2", "return print(a)",
     "return a\n    a = 1", "return f(a, a)", "return a.x", "break", "return load(a, a)"],
)  # fmt: skip
def test_everything_else_is_refused(body):
    def load(builder, address):
        return address

    with pytest.raises(SyntaxError, match=r"line [23]"):
        compile_words(f"def f(a):\n    {body}\n", {"f": "f"}, {"load": load}, host().triple)


def test_a_missing_function_is_named():
    with pytest.raises(SyntaxError, match="g"):
        compile_words("def f(a):\n    return a\n", {"g": "g"}, {}, host().triple)

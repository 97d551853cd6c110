"""Loading object files: relocations, segments and their protection, and what is refused."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from onnxjit.codegen.target import _llvm_host, host, linux_x86, target_machine
from onnxjit.runtime import elf, orc
from onnxjit.runtime.link import LinkError, link

llvm = pytest.importorskip("llvmlite.binding")

own_loader = pytest.mark.skipif(linux_x86() is None, reason="LLVM loads the objects here")

FIRST = """
@table = internal constant [3 x double] [double 1.0, double 2.0, double 4.0], align 32
@calls = internal global [2 x ptr] [ptr @twice, ptr @half]
@count = internal global i64 7
@zeros = internal global [100 x i64] zeroinitializer, align 64
@shared = external global i64
@elsewhere = external constant i64
declare double @exp2(double)
declare double @third(double)

define double @lookup(i64 %i) {
  %p = getelementptr double, ptr @table, i64 %i
  %x = load double, ptr %p
  ret double %x
}
define internal double @twice(double %x) { %y = fmul double %x, 2.0  ret double %y }
define internal double @half(double %x) { %y = fmul double %x, 0.5  ret double %y }
define double @indirect(i64 %i, double %x) {
  %p = getelementptr ptr, ptr @calls, i64 %i
  %f = load volatile ptr, ptr %p
  %y = call double %f(double %x)
  ret double %y
}
define i64 @counted() {
  %old = load i64, ptr @count
  %new = add i64 %old, 1
  store i64 %new, ptr @count
  %z = load volatile i64, ptr @zeros
  %r = add i64 %new, %z
  ret i64 %r
}
define double @power(double %x) { %y = call double @exp2(double %x)  ret double %y }
define double @other(double %x) { %y = call double @third(double %x)  ret double %y }
define i64 @both() {
  %a = load i64, ptr @shared
  %b = load i64, ptr @elsewhere
  %c = add i64 %a, %b
  ret i64 %c
}
define i64 @choice(i64 %i) {
  switch i64 %i, label %d [ i64 0, label %a  i64 1, label %b  i64 2, label %c  i64 3, label %e
                            i64 4, label %f ]
a: ret i64 31
b: ret i64 4
c: ret i64 15
d: ret i64 -9
e: ret i64 26
f: ret i64 5
}
"""
SECOND = """
@elsewhere = constant i64 100
define double @third(double %x) { %y = fdiv double %x, 3.0  ret double %y }
"""


def emitted(text: str) -> bytes:
    machine = target_machine(host())
    module = llvm.parse_assembly(text)
    module.triple = host().triple
    module.data_layout = str(machine.target_data)
    module.verify()
    return machine.emit_object(module)


def function(address: int, result: type, *arguments: type):
    return ctypes.CFUNCTYPE(result, *arguments)(address)


@pytest.mark.parametrize("loader", [pytest.param("own", marks=own_loader), "orc"])
def test_every_way_to_refer_to_something(loader: str) -> None:
    """Constants, tables of addresses, data, calls and reads within and between objects."""
    objects = [emitted(FIRST), emitted(SECOND)]
    shared = ctypes.c_int64(11)
    exp2 = ctypes.cast(ctypes.CDLL(None).exp2, ctypes.c_void_p).value or 0
    imports = {"shared": ctypes.addressof(shared), "exp2": exp2}
    if loader == "own":
        keep, found = elf.load([elf.read(image) for image in objects], imports)
    else:
        names = "lookup indirect counted power other both choice third elsewhere".split()
        keep, found = orc.load(objects, imports, names)
    f64, i64 = ctypes.c_double, ctypes.c_int64
    lookup = function(found["lookup"], f64, i64)
    assert [lookup(i) for i in range(3)] == [1, 2, 4]
    indirect = function(found["indirect"], f64, i64, f64)
    assert (indirect(0, 3.0), indirect(1, 3.0)) == (6.0, 1.5)
    counted = function(found["counted"], i64)
    assert (counted(), counted()) == (8, 9)
    assert function(found["power"], f64, f64)(5.0) == 32
    assert function(found["other"], f64, f64)(12.0) == 4
    both = function(found["both"], i64)
    assert both() == 111
    shared.value = 20
    assert both() == 120
    choice = function(found["choice"], i64, i64)
    assert [choice(i) for i in range(-1, 6)] == [-9, 31, 4, 15, 26, 5, -9]
    assert ctypes.c_int64.from_address(found["elsewhere"]).value == 100
    del keep


@own_loader
def test_code_and_constants_cannot_be_written() -> None:
    keep, found = elf.load([elf.read(emitted(SECOND))], {})
    rights = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        for name, address in found.items():
            if begin <= address < end:
                rights[name] = line.split()[1][:3]
    assert rights == {"third": "r-x", "elsewhere": "r--"}
    del keep


@own_loader
def test_alignment_and_zeros_of_many_objects() -> None:
    text = """
    @wide_{0} = constant [5 x i8] c"abcd{0}", align 128
    @bss_{0} = global [33 x i8] zeroinitializer, align 64
    define i64 @f_{0}() align 64 {{ ret i64 {0} }}
    """
    keep, found = elf.load([elf.read(emitted(text.format(n))) for n in range(9)], {})
    for n in range(9):
        assert found[f"f_{n}"] % 64 == found[f"bss_{n}"] % 64 == found[f"wide_{n}"] % 128 == 0
        assert ctypes.string_at(found[f"wide_{n}"], 5) == f"abcd{n}".encode()
        assert ctypes.string_at(found[f"bss_{n}"], 33) == bytes(33)
        assert function(found[f"f_{n}"], ctypes.c_int64)() == n
    del keep


@own_loader
@pytest.mark.parametrize(
    "text, complaint",
    [
        ("@t = thread_local global i64 1", "thread-local data"),
        ("@c = common global i64 0", "'c' is in no section"),
    ],
)
def test_what_is_not_supported_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(LinkError, match=f"cannot link 1 objects: .*{complaint}"):
        link([emitted(text)])


@own_loader
def test_unknown_relocations_are_refused() -> None:
    image = bytearray(emitted(FIRST))
    file = elf.read(bytes(image))
    at = next(s.offset for s in file.sections if s.kind == 4)
    (kind,) = struct.unpack_from("<I", image, at + 8)
    struct.pack_into("<I", image, at + 8, 8)  # R_X86_64_RELATIVE: of shared libraries alone
    assert kind != 8
    with pytest.raises(LinkError, match="relocations of kind 8"):
        link([bytes(image), emitted(SECOND)], {"shared": 64})


@own_loader
def test_linux_names_the_features_that_llvm_finds(tmp_path: Path) -> None:
    from onnxjit.codegen.target import _LINUX_X86

    triple, features = _llvm_host()
    assert linux_x86() == (triple, features & set(_LINUX_X86.values()))
    table = tmp_path / "cpuinfo"
    table.write_text("processor : 0\nflags : fpu avx2 pni abm vmx\n\nflags : avx512f\n")
    assert linux_x86(table) == (triple, {"avx2", "sse3", "lzcnt"})
    table.write_text("processor : 0\n")
    assert linux_x86(table) is None
    assert linux_x86(tmp_path / "absent") is None


@own_loader
def test_a_warm_start_needs_neither_llvm_nor_dataclasses(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", [x], [y])
    model = str(tmp_path / "m.onnx")
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), model)
    code = f"""
import sys, numpy
before = set(sys.modules)
import onnxjit
f = onnxjit.compile({model!r}, cache={str(tmp_path / "cache")!r})
print(float(f(numpy.zeros((3, 5), "f4")).sum()))
heavy = {{"llvmlite", "llvmlite.binding", "numba", "onnx", "dataclasses", "secrets"}}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    # A key is noted once the model file is older than the resolution of time stamps.
    for expected in (None, None, "15.0\n[]\n"):
        time.sleep(0 if expected else 2.1)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in (None, done.stdout)

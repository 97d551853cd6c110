"""The loops with which a machine is measured, as LLVM IR: multiply-adds, reads, copies, a chain.

They go to the code generator without optimisation passes, so what is written here is what runs.

    multiply-adds  void f(i64 n, ptr p)            n rounds of `accumulators` independent ones
    read           void f(ptr a, i64 bytes, i64 n, ptr sink)   n times over a, 512 bytes a step
    copy           void f(ptr a, ptr b, i64 bytes, i64 n)      n times from a to b
    chain          void f(i64 n, ptr sink)         n rounds of 64 additions, each after the last
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxjit.codegen.instruction_sets import ISAS
from onnxjit.codegen.target import Target

STEP = 512  # bytes of a step of the memory loops; buffers are multiples of it
CHAIN = 64


@dataclass(frozen=True, slots=True)
class Product:
    """An instruction that multiplies `operands` with each other and adds onto `sums`.

    `isa` names a row of `instruction_sets.ISAS`, `features` what is needed beside it. `call` is the
    intrinsic, or "" for a product and an addition. `operations` counts both halves over all lanes.
    """

    dtype: str
    isa: str
    features: frozenset[str]
    sums: str
    operands: str
    call: str
    operations: int

    @property
    def name(self) -> str:
        """As a key: "float32/avx512"."""
        return f"{self.dtype}/{self.isa}"

    def runs_on(self, target: Target) -> bool:
        """Whether `target` has the instruction."""
        isa = ISAS[self.isa]
        return isa.arch in (None, target.arch) and target.has(isa.features | self.features)


def _plain(dtype: str, isa: str, features: frozenset[str] = frozenset()) -> Product:
    kind, bits = {"float32": ("float", 32), "float64": ("double", 64), "float16": ("half", 16)}[
        dtype
    ]
    lanes = ISAS[isa].lanes * 32 // bits
    vector = f"<{lanes} x {kind}>"
    call = f"llvm.fma.v{lanes}f{bits}" if ISAS[isa].fused else ""
    return Product(dtype, isa, features, vector, vector, call, 2 * lanes)


PRODUCTS: tuple[Product, ...] = (
    *(_plain(dtype, isa) for isa in ISAS for dtype in ("float32", "float64")),
    _plain("float16", "avx512", frozenset({"avx512fp16"})),
    Product("bfloat16", "avx512", frozenset({"avx512bf16"}), "<16 x float>", "<32 x bfloat>",
            "llvm.x86.avx512bf16.dpbf16ps.512", 64),
    Product("int8", "avx512", frozenset({"avx512vnni"}), "<16 x i32>", "<64 x i8>",
            "llvm.x86.avx512.vpdpbusd.512", 128),
)  # fmt: skip


def products(product: Product) -> str:
    """A module with the function "products" (see above)."""
    # One register holds the factors. Twelve sums hide a latency of four to six cycles on two
    # ports, 24 that of machines with four.
    count = 12 if ISAS[product.isa].registers < 32 else 24
    sums, operands = product.sums, product.operands
    lines = [f"define void @products(i64 %n, ptr %p) {{\nentry:\n  %x = load {operands}, ptr %p"]
    lines.append("  br label %loop\nloop:")
    lines.append("  %i = phi i64 [ 0, %entry ], [ %j, %loop ]")
    lines += [
        f"  %a{k} = phi {sums} [ zeroinitializer, %entry ], [ %b{k}, %loop ]" for k in range(count)
    ]
    for k in range(count):
        lines += _multiply_add(product, k)
    lines.append("  %j = add i64 %i, 1\n  %more = icmp ult i64 %j, %n")
    lines.append("  br i1 %more, label %loop, label %done\ndone:")
    for k in range(count):
        lines.append(f"  %q{k} = getelementptr i8, ptr %p, i64 {64 * (k + 1)}")
        lines.append(f"  store {sums} %b{k}, ptr %q{k}")
    lines.append("  ret void\n}")
    if product.call:
        order = f"{sums}, {operands}, {operands}"
        if _sums_last(product):
            order = f"{operands}, {operands}, {sums}"
        lines.append(f"declare {sums} @{product.call}({order})")
    return "\n".join(lines)


def rounds_of(product: Product) -> int:
    """Operations of one round of `products`."""
    return product.operations * (12 if ISAS[product.isa].registers < 32 else 24)


def _sums_last(product: Product) -> bool:
    return product.call.startswith("llvm.fma.")


def _multiply_add(product: Product, k: int) -> list[str]:
    sums, operands = product.sums, product.operands
    if not product.call:
        # The sum takes part in the product: one that did not would be computed once for all.
        return [f"  %m{k} = fmul {sums} %a{k}, %x", f"  %b{k} = fadd {sums} %m{k}, %x"]
    order = [f"{sums} %a{k}", f"{operands} %x", f"{operands} %x"]
    if _sums_last(product):
        order = [*order[1:], order[0]]
    return [f"  %b{k} = call {sums} @{product.call}({', '.join(order)})"]


def memory(vector_bytes: int) -> str:
    """A module with the functions "read" and "copy", in vectors of the given size."""
    vector = f"<{vector_bytes // 4} x i32>"
    count = STEP // vector_bytes
    sums = min(count, 8)
    read = [_loops("read", "ptr %a, i64 %bytes, i64 %n, ptr %sink")]
    read += [f"  %s{k} = phi {vector} [ %t{k}, %outer ], [ %u{k}, %inner ]" for k in range(sums)]
    last = [f"%s{k}" for k in range(sums)]
    for k in range(count):
        read += _load(vector, "a", k, vector_bytes)
        made = f"%u{k % sums}" if k >= count - sums else f"%w{k}"
        read.append(f"  {made} = xor {vector} {last[k % sums]}, %v{k}")
        last[k % sums] = made
    read.append(_ends())
    read += [
        f"  %z{k} = xor {vector} %{f'z{k - 1}' if k > 1 else 'u0'}, %u{k}" for k in range(1, sums)
    ]
    read.append(f"  store {vector} %z{sums - 1}, ptr %sink")
    outer = "\n".join(
        f"  %t{k} = phi {vector} [ zeroinitializer, %entry ], [ %u{k}, %next ]" for k in range(sums)
    )
    text = "\n".join([*read, "  ret void\n}"]).replace(";outer phis", outer)
    copy = [_loops("copy", "ptr %a, ptr %b, i64 %bytes, i64 %n")]
    for k in range(count):
        copy += _load(vector, "a", k, vector_bytes)
        copy.append(f"  %o{k} = add i64 %at, {k * vector_bytes}")
        copy.append(f"  %r{k} = getelementptr i8, ptr %b, i64 %o{k}")
        copy.append(f"  store {vector} %v{k}, ptr %r{k}, align {vector_bytes}")
    copy.append(_ends())
    return text + "\n" + "\n".join([*copy, "  ret void\n}"]).replace(";outer phis", "")


def _loops(name: str, parameters: str) -> str:
    return (
        f"define void @{name}({parameters}) {{\nentry:\n  br label %outer\nouter:\n"
        "  %i = phi i64 [ 0, %entry ], [ %j, %next ]\n;outer phis\n  br label %inner\ninner:\n"
        "  %at = phi i64 [ 0, %outer ], [ %to, %inner ]"
    )


def _load(vector: str, base: str, k: int, vector_bytes: int) -> list[str]:
    return [
        f"  %p{k} = add i64 %at, {k * vector_bytes}",
        f"  %q{k} = getelementptr i8, ptr %{base}, i64 %p{k}",
        f"  %v{k} = load {vector}, ptr %q{k}, align {vector_bytes}",
    ]


def _ends() -> str:
    return (
        f"  %to = add i64 %at, {STEP}\n  %again = icmp ult i64 %to, %bytes\n"
        "  br i1 %again, label %inner, label %next\nnext:\n  %j = add i64 %i, 1\n"
        "  %more = icmp ult i64 %j, %n\n  br i1 %more, label %outer, label %done\ndone:"
    )


def chain() -> str:
    """A module with the function "chain" (see above): one addition a cycle on every processor."""
    lines = [
        "define void @chain(i64 %n, ptr %sink) {\nentry:\n  br label %loop\nloop:",
        "  %i = phi i64 [ 0, %entry ], [ %j, %loop ]",
        f"  %x0 = phi i64 [ 0, %entry ], [ %x{CHAIN}, %loop ]",
    ]
    for k in range(CHAIN):
        lines.append(f"  %y{k} = add i64 %x{k}, 1")
        # Empty assembly keeps the code generator from adding 64 at once.
        lines.append(f'  %x{k + 1} = call i64 asm sideeffect "", "=r,0"(i64 %y{k})')
    lines.append("  %j = add i64 %i, 1\n  %more = icmp ult i64 %j, %n")
    lines.append(
        f"  br i1 %more, label %loop, label %done\ndone:\n  store i64 %x{CHAIN}, ptr %sink"
    )
    lines.append("  ret void\n}")
    return "\n".join(lines)

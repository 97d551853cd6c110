"""The native executor, as text in the restricted Python of `codegen/word_compiler.py`.

`SOURCE` is compiled once per machine by whoever owns a compiler
(`codegen.sync_intrinsics.object_code`) into an object with the C symbols of `SYMBOLS`; the runtime
itself never imports one. All values are 64-bit integers, most of them addresses; the layouts below
are shared with the Python side.

Threads. One thread (the leader) walks the steps. A parallel step is published in the pool's first
cache line, round by round: `ROW` = the step, `CLAIM` = epoch << 24 | last << 12 | first, the chunks
[first, last) that nobody has yet. Whoever moves an end of that range by compare-exchange owns the
chunks between; the leader takes chunks too, then waits until `DONE` counts the workers' chunks. A
worker touches a run's memory only while it owns chunks of it, so late, slow or absent workers cost
nothing and need no registration: results and termination never depend on them. `ROW` and `LIMIT`
are read before the exchange; its success proves that they belonged to that epoch, since the leader
rewrites them only after the range is empty. Even threads take chunks from the front, odd ones from
the back: a thread then meets in the next step the part of the data that its caches hold from the
last one. A claim takes a share of what is left, half of an equal one, so that few claims suffice
and the last are single chunks (guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions
on Computers C-36, 1987).

All threads treat denormal floats as zero while they run steps.
"""

from __future__ import annotations

_WORD = 8

# Step table: two cache lines a row, the second for parallel steps alone.
ROW = {name: i * _WORD for i, name in enumerate(
    ("KERNEL", "PTRS", "INTS", "TILES", "CHUNK", "CHUNKS", "WAKE", "CONTEXT", "ROUND", "FIRST")
)}  # fmt: skip
ROW_BYTES = 128

CONTEXT = {name: i * _WORD for i, name in enumerate(
    ("ROWS", "FIRST", "LAST", "THREADS", "POOL", "SCRATCH", "SCRATCH_STRIDE", "PROFILE", "LAYOUT",
     "INPUT_COUNT", "INPUTS", "OUTPUT_COUNT", "OUTPUTS", "STEPS", "QUICK")
)}  # fmt: skip
CONTEXT_BYTES = 128

# Input and output tables of a context: one cache line an array.
ARRAY = {name: i * _WORD for i, name in enumerate(
    ("DTYPE", "RANK", "SHAPE", "PATCH_COUNT", "PATCHES", "SEEN")
)}  # fmt: skip
ARRAY_BYTES = 64

# Offsets of fields in Python's objects, found by runtime/layout.py.
LAYOUT = {name: i * _WORD for i, name in enumerate(
    ("TUPLE_SIZE", "TUPLE_ITEMS", "LIST_ITEMS", "OBJECT_TYPE", "ARRAY_TYPE", "ARRAY_RANK",
     "ARRAY_SHAPE", "ARRAY_DTYPE", "ARRAY_FLAGS", "FLAGS_NEEDED", "SAVE_THREAD", "RESTORE_THREAD",
     "INCREF", "TRUE", "FALSE")
)}  # fmt: skip
# Where an array keeps its data address. A constant: a builtin function finds everything through it.
ARRAY_DATA = 16

# The pool: words that different threads write lie on different lines.
POOL = {
    "CLAIM": 0, "ROW": 8, "LIMIT": 16,
    "DONE": 128, "BUSY": 256, "SLEEPERS": 384, "WAKES": 392, "PENDING": 400, "WORKERS": 448,
    "STOP": 512, "SPIN": 520, "MUTEX": 528, "CONDITION": 536, "CLOCK_ID": 544,
    "LOCK": 552, "UNLOCK": 560, "WAIT": 568, "BROADCAST": 576, "CLOCK": 584, "YIELD": 592,
}  # fmt: skip
POOL_BYTES = 640

MAX_CHUNKS = 0xFFF

SYMBOLS = {"run": "onnxjit_run", "execute": "onnxjit_execute", "worker": "onnxjit_worker"}

_BODY = '''
def wake(pool):
    """Let parked workers look at the pool again.

    While they are on their way, asking twice is waste.
    """
    if atomic_load(pool + POOL_SLEEPERS) == 0 or atomic_load(pool + POOL_PENDING) != 0:
        return
    call1(load(pool + POOL_LOCK), load(pool + POOL_MUTEX))
    # Under the mutex the count is exact: whoever is counted will clear PENDING when it wakes.
    if atomic_load(pool + POOL_SLEEPERS) > 0:
        atomic_store(pool + POOL_PENDING, 1)
        atomic_add(pool + POOL_WAKES, 1)
    call1(load(pool + POOL_UNLOCK), load(pool + POOL_MUTEX))
    call1(load(pool + POOL_BROADCAST), load(pool + POOL_CONDITION))


def now(pool):
    return clock_ns(load(pool + POOL_CLOCK), load(pool + POOL_CLOCK_ID))


def empty(claim):
    return claim & 0xFFF == (claim >> 12) & 0xFFF


def share(pool, claim):
    """How many of the unclaimed chunks to take, at least one."""
    threads = atomic_load(pool + POOL_LIMIT)
    left = ((claim >> 12) & 0xFFF) - (claim & 0xFFF)
    if left < 4 * threads:
        return 1
    return left // (2 * threads)


def chunks_of(row, index, count, thread):
    """Run `count` chunks of a round, from chunk `index` on."""
    context = load(row + ROW_CONTEXT)
    size = load(row + ROW_CHUNK)
    first = load(row + ROW_FIRST)
    begin = first + index * size
    end = min(begin + count * size, first + load(row + ROW_ROUND))
    scratch = load(context + CONTEXT_SCRATCH) + thread * load(context + CONTEXT_SCRATCH_STRIDE)
    call_kernel(load(row + ROW_KERNEL), load(row + ROW_PTRS), load(row + ROW_INTS), scratch,
                begin, end)


def chunks_timed(pool, row, index, count, thread, profile):
    """The same, adding its time to the thread's counter of this step."""
    context = load(row + ROW_CONTEXT)
    steps = load(context + CONTEXT_STEPS)
    step = (row - load(context + CONTEXT_ROWS)) // ROW_BYTES
    start = now(pool)
    chunks_of(row, index, count, thread)
    busy = profile + 8 * (2 * steps + thread * steps + step)
    store(busy, load(busy) + now(pool) - start)


def alone(row, context):
    tiles = load(row + ROW_TILES)
    if tiles > 0:
        call_kernel(load(row + ROW_KERNEL), load(row + ROW_PTRS), load(row + ROW_INTS),
                    load(context + CONTEXT_SCRATCH), 0, tiles)


def shared(pool, row, first, epoch, profile):
    """One round of a parallel step, from tile `first` on, by the leader and whoever comes."""
    store(row + ROW_FIRST, first)
    chunks = load(row + ROW_CHUNKS)
    atomic_store(pool + POOL_ROW, row)
    atomic_store(pool + POOL_DONE, 0)
    atomic_store(pool + POOL_CLAIM, (epoch << 24) | (chunks << 12))
    if first == 0 and load(row + ROW_WAKE) != 0:
        wake(pool)
    own = 0
    while True:
        claim = atomic_load(pool + POOL_CLAIM)
        if empty(claim):
            break
        count = share(pool, claim)
        if compare_exchange(pool + POOL_CLAIM, claim, claim + count):
            index = claim & 0xFFF
            if profile != 0:
                chunks_timed(pool, row, index, count, 0, profile)
            else:
                chunks_of(row, index, count, 0)
            own += count
    rounds = 0
    while atomic_load(pool + POOL_DONE) != chunks - own:
        pause()
        rounds += 1
        if rounds > 2000:  # more threads than cores: let the owner of the last chunk run
            call0(load(pool + POOL_YIELD))


def execute(context):
    """Run steps FIRST to LAST of a context on the calling thread and the pool's workers."""
    rows = load(context + CONTEXT_ROWS)
    first = load(context + CONTEXT_FIRST)
    last = load(context + CONTEXT_LAST)
    threads = load(context + CONTEXT_THREADS)
    pool = load(context + CONTEXT_POOL)
    profile = load(context + CONTEXT_PROFILE)
    control = flush_denormals()
    leads = False
    if threads > 1 and atomic_load(pool + POOL_WORKERS) > 0:
        leads = compare_exchange(pool + POOL_BUSY, 0, 1)
    epoch = 0
    if leads:
        atomic_store(pool + POOL_LIMIT, threads)
        epoch = atomic_load(pool + POOL_CLAIM) >> 24
    for step in range(first, last):
        row = rows + step * ROW_BYTES
        if profile != 0:
            store(profile + 16 * step, now(pool))
        if leads and load(row + ROW_CHUNKS) > 1:
            first_tile = 0
            while first_tile < load(row + ROW_TILES):
                epoch += 1
                shared(pool, row, first_tile, epoch, profile)
                first_tile += load(row + ROW_ROUND)
        else:
            alone(row, context)
        if profile != 0:
            store(profile + 16 * step + 8, now(pool))
            if not (leads and load(row + ROW_CHUNKS) > 1):
                busy = profile + 8 * (2 * load(context + CONTEXT_STEPS) + step)
                store(busy, load(profile + 16 * step + 8) - load(profile + 16 * step))
    restore_denormals(control)
    if leads:
        atomic_store(pool + POOL_BUSY, 0)
    return 0


def patch(entry, data):
    """Write an array's address, plus each use's byte offset, where the step table reads it."""
    count = load(entry + ARRAY_PATCH_COUNT)
    patches = load(entry + ARRAY_PATCHES)
    for i in range(count):
        store(load(patches + 16 * i), data + load(patches + 16 * i + 8))
    store(entry + ARRAY_SEEN, data)


def fits(array, entry, layout):
    """Whether a Python object is a NumPy array of the expected type, shape and memory order."""
    if load(array + load(layout + LAYOUT_OBJECT_TYPE)) != load(layout + LAYOUT_ARRAY_TYPE):
        return False
    if load(array + load(layout + LAYOUT_ARRAY_DTYPE)) != load(entry + ARRAY_DTYPE):
        return False
    rank = load(entry + ARRAY_RANK)
    if load32(array + load(layout + LAYOUT_ARRAY_RANK)) != rank:
        return False
    needed = load(layout + LAYOUT_FLAGS_NEEDED)
    if load32(array + load(layout + LAYOUT_ARRAY_FLAGS)) & needed != needed:
        return False
    shape = load(array + load(layout + LAYOUT_ARRAY_SHAPE))
    expected = load(entry + ARRAY_SHAPE)
    for axis in range(rank):
        if load(shape + 8 * axis) != load(expected + 8 * axis):
            return False
    return True


def accept(context, inputs, outputs, layout):
    """Check the inputs and take the addresses of both.

    False, and nothing done, if they do not fit.
    """
    count = load(context + CONTEXT_INPUT_COUNT)
    if load(inputs + load(layout + LAYOUT_TUPLE_SIZE)) != count:
        return False
    items = inputs + load(layout + LAYOUT_TUPLE_ITEMS)
    table = load(context + CONTEXT_INPUTS)
    for i in range(count):
        if not fits(load(items + 8 * i), table + ARRAY_BYTES * i, layout):
            return False
    for i in range(count):
        address = load(load(items + 8 * i) + ARRAY_DATA)
        if address != load(table + ARRAY_BYTES * i + ARRAY_SEEN):
            patch(table + ARRAY_BYTES * i, address)
    items = load(outputs + load(layout + LAYOUT_LIST_ITEMS))
    table = load(context + CONTEXT_OUTPUTS)
    for i in range(load(context + CONTEXT_OUTPUT_COUNT)):
        address = load(load(items + 8 * i) + ARRAY_DATA)
        if address != load(table + ARRAY_BYTES * i + ARRAY_SEEN):
            patch(table + ARRAY_BYTES * i, address)
    return True


def run(header, arguments, count):
    """Body of a Python builtin (METH_FASTCALL) whose self is a context's header array.

    Called with a tuple of inputs and a list of outputs; the answer is True, or False and nothing
    has run: the caller then checks in Python, where errors have names. Arrays are looked at under
    the GIL, which is released while the steps run, unless they take less time than handing it over.
    """
    context = load(header + ARRAY_DATA)
    layout = load(context + CONTEXT_LAYOUT)
    answer = load(layout + LAYOUT_FALSE)
    if count == 2 and accept(context, load(arguments), load(arguments + 8), layout):
        answer = load(layout + LAYOUT_TRUE)
        if load(context + CONTEXT_QUICK) != 0:
            execute(context)
        else:
            thread = call0_pointer(load(layout + LAYOUT_SAVE_THREAD))
            execute(context)
            call1_void(load(layout + LAYOUT_RESTORE_THREAD), thread)
    call1_void(load(layout + LAYOUT_INCREF), answer)
    return answer


def worker(pool, thread):
    """Body of worker number `thread` (1, 2, ...): take chunks, spin a little, park; until STOP."""
    atomic_add(pool + POOL_WORKERS, 1)
    flush_denormals()
    spins = 0
    deadline = 0
    while atomic_load(pool + POOL_STOP) == 0:
        claim = atomic_load(pool + POOL_CLAIM)
        if not empty(claim) and thread < atomic_load(pool + POOL_LIMIT):
            row = atomic_load(pool + POOL_ROW)
            count = share(pool, claim)
            index = claim & 0xFFF
            after = claim + count
            if thread & 1:
                index = ((claim >> 12) & 0xFFF) - count
                after = claim - (count << 12)
            if compare_exchange(pool + POOL_CLAIM, claim, after):
                profile = load(load(row + ROW_CONTEXT) + CONTEXT_PROFILE)
                if profile != 0:
                    chunks_timed(pool, row, index, count, thread, profile)
                else:
                    chunks_of(row, index, count, thread)
                atomic_add(pool + POOL_DONE, count)
                spins = 0
            continue
        pause()
        spins += 1
        if spins & 31 != 0:
            continue
        if spins == 32:
            deadline = now(pool) + load(pool + POOL_SPIN)
        elif now(pool) > deadline:
            call1(load(pool + POOL_LOCK), load(pool + POOL_MUTEX))
            atomic_add(pool + POOL_SLEEPERS, 1)
            wakes = atomic_load(pool + POOL_WAKES)
            while (
                atomic_load(pool + POOL_WAKES) == wakes
                and atomic_load(pool + POOL_STOP) == 0
                and (empty(atomic_load(pool + POOL_CLAIM))
                     or thread >= atomic_load(pool + POOL_LIMIT))
            ):
                call2(load(pool + POOL_WAIT), load(pool + POOL_CONDITION),
                      load(pool + POOL_MUTEX))
            atomic_add(pool + POOL_SLEEPERS, -1)
            atomic_store(pool + POOL_PENDING, 0)
            call1(load(pool + POOL_UNLOCK), load(pool + POOL_MUTEX))
            spins = 0
    atomic_add(pool + POOL_WORKERS, -1)
    return 0
'''


def _constants() -> str:
    tables = {"ROW": ROW, "CONTEXT": CONTEXT, "ARRAY": ARRAY, "LAYOUT": LAYOUT, "POOL": POOL}
    lines = [f"{t}_{name} = {at}" for t, fields in tables.items() for name, at in fields.items()]
    return "\n".join(
        [
            *lines,
            f"ROW_BYTES = {ROW_BYTES}",
            f"ARRAY_BYTES = {ARRAY_BYTES}",
            f"ARRAY_DATA = {ARRAY_DATA}",
            "",
        ]
    )


SOURCE = _constants() + _BODY

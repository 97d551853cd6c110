"""A process that loads a model, runs it and says so: `child.py ENGINE MODEL INPUTS THREADS`.

Run as a script, so that nothing but the engine and NumPy is imported. INPUTS is an .npz file. The
engine "numpy" loads the inputs and no model: what every engine's time contains.

The answer is one line of JSON with sizes in bytes: the peak resident set of this process (`peak`)
and the largest of its children (`children`); the seconds of a later run (`call`); what loading the
model added (`load`) and what running it five times added at the peak (`run`), None where the system
does not tell; onnxjit's `arena`; and a checksum of the first output.
"""

import json
import resource
import sys
import time


def main() -> None:
    engine, model, inputs, threads = sys.argv[1:]
    import numpy as np

    with np.load(inputs) as file:
        feeds = {key: file[key] for key in file.files}
    facts = {}
    if engine == "numpy":
        before = resident("VmRSS")

        def call():
            return list(feeds.values())

    elif engine == "onnxjit":
        import onnxjit

        before = resident("VmRSS")
        compiled = onnxjit.compile(model, threads=int(threads))
        arrays = [feeds[v.name] for v in compiled.inputs]

        def call():
            return compiled.run(arrays)

    elif engine == "openvino":
        import openvino

        before = resident("VmRSS")
        settings = {
            "INFERENCE_NUM_THREADS": int(threads),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

        def call():
            request.infer(feeds, share_inputs=True)
            return [request.get_output_tensor(0).data]

    else:
        import onnxruntime

        before = resident("VmRSS")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def call():
            return session.run(None, feeds)

    loaded = resident("VmRSS")
    peak = usage(resource.RUSAGE_SELF)
    reset = reset_peak()
    outputs = call()
    checksum = float(abs(outputs[0].astype("float64")).sum())
    facts = {"checksum": checksum, "children": usage(resource.RUSAGE_CHILDREN)}
    facts["peak"] = max(peak, usage(resource.RUSAGE_SELF))
    print(json.dumps(facts), flush=True)
    # What follows is no part of the first output's time.
    facts["call"] = min(timed(call) for _ in range(4))
    after = resident("VmHWM") if reset else None
    facts["load"] = None if loaded is None else loaded - before
    facts["run"] = None if after is None or loaded is None else after - loaded
    facts["arena"] = compiled.arena_bytes() if engine == "onnxjit" else None
    print(json.dumps(facts), flush=True)


def timed(call):
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def usage(who):
    """Peak resident set in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def resident(name):
    """An entry of /proc/self/status in bytes."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak():
    """Make VmHWM count from now on; whether the system let us."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()

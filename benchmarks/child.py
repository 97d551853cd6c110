"""A process that loads a model, runs it once and says so: `child.py ENGINE MODEL INPUTS THREADS`.

Run as a script, so that nothing but the engine and NumPy is imported. INPUTS is an .npz file. The
answer is one line of JSON: this process's peak resident set in bytes, and that of its children.
"""

import json
import resource
import sys


def main() -> None:
    engine, model, inputs, threads = sys.argv[1:]
    import numpy as np

    with np.load(inputs) as file:
        feeds = {key: file[key] for key in file.files}
    if engine == "onnxjit":
        import onnxjit

        compiled = onnxjit.compile(model, threads=int(threads))
        outputs = compiled.run([feeds[v.name] for v in compiled.inputs])
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, feeds)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    checksum = float(abs(outputs[0].astype("float64")).sum())
    print(json.dumps({"peak": peak, "children": children, "checksum": checksum}), flush=True)


if __name__ == "__main__":
    main()

"""`python -m onnxjit`: the same as the command `onnxjit`."""

from onnxjit.cli import main

if __name__ == "__main__":
    main()

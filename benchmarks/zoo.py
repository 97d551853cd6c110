"""The models that are measured, where they are, and inputs for them.

`DIR/models.json` gives example shapes and how to fill them; a model's file is anywhere below DIR.
The light models are also found inside the onnx package.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

LIGHT = """light_bvlc_alexnet light_densenet121 light_inception_v1 light_inception_v2 light_resnet50
    light_shufflenet light_squeezenet light_vgg19 light_zfnet512""".split()
NAMES = [
    *LIGHT,
    *"""ppocrv4_det ppocrv4_rec ppocr_cls_mobile_v2 magika_v3_3 basic_pitch_nmp layout_cdla_picodet
    paraphrase_minilm_l3 resnet50 resnet50_dyn resnet50_ts mobilenetv2 efficientnet_b0 convnext_tiny
    swin_tiny vit_base16_dyn bert_base_dyn bert_base_ts distilbert_dyn gpt2_past_dyn
    llama_small_past_dyn whisper_tiny_encoder unet32_dyn mlp_dyn mnist_cnn_dyn""".split(),
]

# Sizes beyond the example's, by the model's name of a dimension, or INPUT[AXIS] where it has none.
_BATCH = [{"batch": 2}, {"batch": 5}]
_TEXT = [{"batch": 2, "seq": 17}, {"batch": 1, "seq": 200}]
_PAST = [
    {"batch": 2, "seq": 3, "past": 20, "total": 23},
    {"batch": 1, "seq": 7, "past": 0, "total": 7},
]
_PADDLE = "p2o.DynamicDimension."
SIZES: dict[str, list[dict[str, int]]] = {
    "ppocrv4_det": [
        {f"{_PADDLE}1": 320, f"{_PADDLE}2": 480},
        {f"{_PADDLE}0": 2, f"{_PADDLE}1": 352, f"{_PADDLE}2": 256},
    ],
    "ppocrv4_rec": [{f"{_PADDLE}1": 160}, {f"{_PADDLE}0": 3, f"{_PADDLE}1": 480}],
    "ppocr_cls_mobile_v2": [{"x[0]": 2}, {"x[0]": 5, "x[3]": 320}],
    "magika_v3_3": [{"unk__214": 2}, {"unk__214": 5}],
    "basic_pitch_nmp": [{"unk__749": 2}, {"unk__749": 3}],
    "paraphrase_minilm_l3": [
        {"batch_size": 2, "sequence_length": 17},
        {"batch_size": 1, "sequence_length": 200},
    ],
    "resnet50_dyn": _BATCH,
    "resnet50_ts": _BATCH,
    "vit_base16_dyn": _BATCH,
    "bert_base_dyn": _TEXT,
    "bert_base_ts": _TEXT,
    "distilbert_dyn": _TEXT,
    "gpt2_past_dyn": _PAST,
    "llama_small_past_dyn": _PAST,
    "unet32_dyn": [
        {"batch": 2, "16*h16": 64, "16*w16": 96},
        {"batch": 1, "16*h16": 160, "16*w16": 128},
    ],
    "mlp_dyn": [{"batch": 7}, {"batch": 64}],
    "mnist_cnn_dyn": [{"batch": 7}, {"batch": 33}],
}


def selected(arguments: Namespace) -> list[str]:
    """The models that were asked for and are there; says which are not."""
    wanted = arguments.only or NAMES
    found = [name for name in wanted if path(arguments.models, name) is not None]
    for name in wanted:
        if name not in found:
            print(f"{name}: not below {arguments.models}")
    if not found:
        raise SystemExit("no model to measure")
    return found


def path(folder: Path, name: str) -> str | None:
    """The file of a model."""
    candidates = sorted(folder.rglob(f"{name}.onnx")) if folder.is_dir() else []
    if not candidates and name in LIGHT:
        import onnx

        light = Path(onnx.__file__).parent / "backend/test/data/light" / f"{name}.onnx"
        candidates = [light] if light.is_file() else []
    return str(candidates[0]) if candidates else None


@cache
def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / "models.json"
    return {m["name"]: m for m in json.loads(file.read_text())} if file.is_file() else {}


def inputs(folder: Path, name: str, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Arrays by input name: the example's shapes with `sizes` in place of some of them."""
    rng = np.random.default_rng(0)
    facts = _metadata(folder).get(name)
    if facts is None:
        return _by_model(folder, name, sizes)
    labels = {v["name"]: v["shape"] for v in facts["inputs"]}
    arrays = {}
    for key, example in facts["example_inputs"].items():
        shape = [
            (sizes or {}).get(str(label), (sizes or {}).get(f"{key}[{axis}]", size))
            for axis, (label, size) in enumerate(zip(labels[key], example["shape"], strict=True))
        ]
        arrays[key] = _fill(rng, example["dtype"], shape, example["rule"])
    return arrays


def variants(name: str) -> Iterator[dict[str, int]]:
    """The sizes to try: those of the example, then the others."""
    yield {}
    yield from SIZES.get(name, [])


def _by_model(folder: Path, name: str, sizes: Mapping[str, int] | None) -> dict[str, Any]:
    import onnxjit
    from onnxjit.bench import random_inputs

    return random_inputs(onnxjit.compile(path(folder, name)).inputs, sizes)


def _fill(rng: np.random.Generator, dtype: str, shape: list[int], rule: str) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        spread = re.match(r"N\(0,\s*([0-9.]+)\)", rule)
        scale = float(spread[1]) if spread else 1.0
        return (rng.standard_normal(shape) * scale).astype(dtype)
    if "ones" in rule:
        return np.ones(shape, dtype)
    if "zeros" in rule:
        return np.zeros(shape, dtype)
    limit = re.search(r"\[0,\s*(\d+)\)", rule)
    return rng.integers(0, int(limit[1]) if limit else 2, shape).astype(dtype)

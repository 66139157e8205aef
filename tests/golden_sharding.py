"""Where every array of Qwen3-0.6B, 4B and 8B lies on a mesh of 4 x 8 x 2: `python tests/golden_sharding.py` writes
tests/golden/sharding.json, which `test_sharding.py` compares with the code."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from tsopsd_jax.distributed.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, tree_shardings
from tsopsd_jax.model import Qwen3
from tsopsd_jax.model.decoding import rollout_view, view_axes
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.types import PyTree

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden" / "sharding.json"
MODELS = ("Qwen3-0.6B", "Qwen3-4B-Base", "Qwen3-8B-Base")
MESH = AbstractMesh((4, 8, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def table() -> dict[str, Any]:
    """{model: {training | decoding: {array: "logical axes / shape / mesh axes"}}};
    decoding shows the first of the equal layers."""
    found = {}
    for name in MODELS:
        model = Qwen3(read_config(ROOT / "configs" / "models" / name / "config.json"))
        masters = model.param_shapes()
        view = jax.eval_shape(functools.partial(rollout_view, model), masters)
        axes = view_axes(model)
        assert all(layer == axes["layers"][0] for layer in axes["layers"])
        decoding = _rows(axes, view, DECODE_RULES)
        found[name] = {
            "training": _rows(model.param_axes(), masters, TRAIN_RULES),
            "decoding": {key: row for key, row in decoding.items() if "layers" not in key or "['layers'][0]" in key},
        }
    return found


def _rows(axes: PyTree, shapes: PyTree, rules: Any) -> dict[str, str]:
    shardings = jax.tree_util.tree_leaves_with_path(tree_shardings(axes, shapes, MESH, rules))
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, str) for n in x))
    sizes = jax.tree.leaves(shapes)
    return {
        jax.tree_util.keystr(path): f"{', '.join(name)} / {', '.join(map(str, size.shape))} / {_spec(sharding.spec)}"
        for (path, sharding), name, size in zip(shardings, names, sizes, strict=True)
    }


def _spec(spec: Any) -> str:
    return ", ".join("-" if axis is None else str(axis) for axis in spec)


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(table(), indent=1) + "\n")

"""Strict numerics for every test, eight virtual CPU devices, a persistent compilation cache, shared tiny models."""

import importlib.util
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parents[1]
# Outside the clone: a second run, in another clone too, compiles nothing.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsopsd_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook  # noqa: E402  (the environment comes first)

# Shapes and types of the functions that handle arrays are checked while testing, and only then. (Not types.py: its
# containers also hold shardings and abstract arrays, as every pytree does.)
CHECKED = [
    "distributed.sharding",
    "losses",
    "advantages",
    "rewards",
    "model",
    "logit_stats",
    "head",
    "objectives",
    "rollout",
    "judge",
    "learn.update",
    "learn.packing",
    "evaluation.evaluate",
    "analysis",
]
for _name in CHECKED:  # a stale name would be silently inert
    assert importlib.util.find_spec(f"tsopsd_jax.{_name}") is not None, f"no module tsopsd_jax.{_name}"
_hook = install_import_hook([f"tsopsd_jax.{name}" for name in CHECKED], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from tiny_run import trainers  # noqa: E402
from tpu_cloud import Cloud  # noqa: E402

from tsopsd_jax.data import Tokenizer  # noqa: E402
from tsopsd_jax.data.countdown import write_tokenizer  # noqa: E402
from tsopsd_jax.model import Qwen3, Qwen3Config  # noqa: E402

TINY = Qwen3Config(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=1e4,
)


LONGEST = ("test_processes", "test_arms", "test_trainer", "test_crashes", "test_elastic", "test_cli")
"""Files of minutes: they begin first, so that at the end no worker waits for another."""


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny():
    """(model, params): a two-layer Qwen3 with weights large enough that its distributions are not uniform."""
    model = Qwen3(TINY)
    keys = iter(jax.random.split(jax.random.key(7), 100))

    def weight(path, shape):
        noise = jax.random.normal(next(keys), shape.shape)
        return 1.0 + 0.1 * noise if "norm" in jax.tree_util.keystr(path) else 0.4 * noise

    return model, jax.tree_util.tree_map_with_path(weight, model.param_shapes())


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets beside the checkout; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder.relative_to(ROOT.parent)} beside the checkout")
    return folder


@pytest.fixture
def cloud(tmp_path):
    """Stubs of gcloud, kubectl and a worker's tools, alone on PATH, for the scripts of tpu/."""
    return Cloud(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tokenizer of the countdown task."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def trainer_in(tokenizer):
    """trainer_in(run_dir, phases=..., verify=..., evaluate=...) -> Trainer of a tiny run; closed at the end."""
    return trainers(tokenizer)


@pytest.fixture(scope="session")
def buckets(tmp_path_factory):
    """The folder in which gs://NAME is the folder NAME, in the place of gcsfs."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    folder = tmp_path_factory.mktemp("buckets")

    class Buckets(DirFileSystem):
        protocol = ("gs", "gcs")

        def __init__(self, **_):
            super().__init__(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path):
            return super()._join(str(path).removeprefix("gs://"))

    fsspec.register_implementation("gcs", Buckets, clobber=True)
    return folder

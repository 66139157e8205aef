"""Names of topologies and devices, the compiler's description of a GPU, and what the tables of peaks hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tsopsd_jax.hardware.chips import GPUS, TPUS, chip_of
from tsopsd_jax.plan import topologies
from tsopsd_jax.plan.topologies import target_config, topology

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_gpu_compiler(monkeypatch):
    """As where the extra `cuda` is not installed."""
    find = topologies.importlib.util.find_spec
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None if "cuda" in name else find(name))


@pytest.mark.parametrize(
    "name",
    ["h100:8", "H100:8", "h100-80gb:8", "h100-8", "8xH100", "8 x h100", "h100x8", "H100-SXM5-80GB:8", "nvidia h100:8"],
)
def test_the_ways_in_which_people_write_gpus(name):
    found = topology(name)
    assert (found.name, found.count, found.platform, found.chip) == ("h100:8", 8, "gpu", GPUS["h100"])


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("v5p-64", ("v5p", "2x4x4", 1)),  # counts cores, two a chip
        ("v4-8", ("v4", "2x2x1", 1)),
        ("v5litepod-16", ("v5e", "4x4", 1)),  # counts chips
        ("v6e-256", ("v6e", "16x16", 1)),
        ("tpu-v5e:16x16*2", ("v5e", "16x16", 2)),
        ("A100-80GB:4", ("a100-80g", "4", 1)),
        ("a100-40g:4", ("a100-40g", "4", 1)),
    ],
)
def test_names_of_slices_and_cards(name, read):
    assert topologies._read(name) == read


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100:8", r"did you mean a100-40g:8 or a100-80g:8\?"),
        ("h10:8", r"did you mean h100:8\?"),
        ("v5l:4x4", r"did you mean v5[ep]:4x4\?"),
        ("h200", r"did you mean h200:8\?"),
        ("v5p-63", "31.5 chips, expected a shape of theirs, such as v5p:2x2x1"),
        ("v9:2x2", "expected one of TPUs v4:2x2x1"),
    ],
)
def test_other_names_are_answered(name, words):
    with pytest.raises(ValueError, match=words):
        topology(name)


def test_devices_are_known_by_the_name_of_their_kind():
    """As JAX and the compilers' topologies say it; a card of another shape (PCIe) has other peaks and is not known."""
    known = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
    for kind, name in known.items():
        assert chip_of(kind) is TPUS[name]
    for chip in GPUS.values():
        assert chip.target is not None
        assert chip_of(chip.target.name) in (chip, GPUS["h100"])  # an H800 compiles as an H100
    assert chip_of("NVIDIA H100 PCIe") is None
    assert chip_of("cpu") is None


def test_what_the_compiler_is_told_of_a_gpu():
    """Against what was read from an H100: `h100_sxm.txtpb` of XLA's repository."""
    text = target_config(GPUS["h100"].target)
    for line in (
        "core_count: 132 ",
        "memory_bandwidth: 3352320000000 ",
        "l2_cache_size: 52428800 ",
        "device_memory_size: 84942979072 ",
        "shared_memory_per_block_optin: 232448 ",
        "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }",
        'device_description_str: "NVIDIA H100 80GB HBM3"',
    ):
        assert line in text + " "
    assert "cuda_compute_capability { major: 8 }" in target_config(GPUS["a100-80g"].target)


def test_a_run_on_gpus_takes_the_memory_that_a_plan_counts_with():
    """JAX's own share, 0.75, would leave the run less; what the user set stays."""
    code = "import os\nfrom tsopsd_jax.cli import main\n"
    code += (
        "try:\n    main(['check', 'nowhere.yaml'])\nfinally:\n    print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"
    )
    for set_before, found in ((None, "0.92"), ("0.5", "0.5")):
        env = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_MEM_FRACTION"} | {"PYTHONPATH": str(ROOT)}
        env |= {} if set_before is None else {"XLA_PYTHON_CLIENT_MEM_FRACTION": set_before}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [found]
    # Of 80 GB: 92 % are JAX's, 3 % of those stay free.
    assert topology("h100:8").usable_bytes == int(80e9 * 0.92 * 0.97)

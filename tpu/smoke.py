"""Show that a slice can train before a run starts on it; `worker.sh smoke` starts this on all workers at once.

    smoke.py RUN_DIR --devices N

In this order: JAX sees all devices of the slice; every process writes, reads and deletes an object beside RUN_DIR; the
toy of smoke.yaml takes one step of RL and one of the reheater on all devices, with its checkpoints in RUN_DIR.smoke,
which is deleted afterwards. Exit codes are those of `tsopsd`.
"""

import argparse
import functools
import sys
import uuid
from pathlib import Path

import jax
from etils import epath

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.commands.train import run_file
from tsopsd_jax.distributed import heartbeat, processes

TOY = Path(__file__).with_name("smoke.yaml")


def check_devices(count: int, platform: str) -> None:
    """Raise ValueError unless there are `count` devices of that platform, in all processes together."""
    devices = jax.devices()
    if len(devices) != count or devices[0].platform != platform:
        raise ValueError(f"expected {count} devices of {platform}, got {len(devices)} of {devices[0].platform}")


def check_place(place: str) -> None:
    """Raise ValueError unless this process may write, read and delete beside `place`."""
    file, text = epath.Path(f"{place}-{jax.process_index()}"), uuid.uuid4().hex
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        read = file.read_text()
        file.unlink()
    except Exception as error:  # clients of stores raise whatever they like
        raise ValueError(
            f"{file}: expected to write, read and delete there, got {type(error).__name__}: {error}; "
            "may the service account of the machine write to the bucket?"
        ) from error
    if read != text:
        raise ValueError(f"{file}: expected to read what was written, got {read!r}")


def clear(place: str) -> None:
    """Delete the toy's run, if there is one; process 0 does it, and the others wait."""
    folder = epath.Path(place)
    if processes.is_first() and folder.exists():
        folder.rmtree()
    processes.exchange(None)


def smoke(run_dir: str, devices: int, platform: str) -> int:
    """Do all of it; returns the exit code."""
    place = f"{run_dir.rstrip('/')}.smoke"
    heartbeat.tick("looking for devices")
    check_devices(devices, platform)
    heartbeat.tick(f"writing to {place}")
    check_place(place)
    clear(place)  # of a smoke test that was cut off
    sizes = [f"phases.{phase}.prompts_per_step={devices}" for phase in range(2)]
    code = run_file(TOY, place, sizes, "smoke")
    clear(place)
    return code


def main(argv: list[str]) -> int:
    """Run on this worker, together with the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="of the run to come, gs://...; nothing is written into it")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="of the slice, or of all slices")
    parser.add_argument("--platform", default="tpu", help="default tpu")
    args = parser.parse_args(argv)
    explain = functools.partial(exit_codes.explain, "smoke")
    try:
        with processes.joined(
            coordinator=None, processes=None, process=None, heartbeat_s=100, stall_s=600, explain=explain
        ):
            return smoke(args.run_dir, args.devices, args.platform)
    except ValueError as error:
        return explain(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

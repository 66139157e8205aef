"""What happens on a worker of a TPU slice: installation, the service, its smoke test, preemption."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tpu_cloud import ROOT, TPU, serving

# ------------------------------------------------------------------ what is installed

INSTALL = re.compile(r"""pip install .*(?:\$\{CODE\}|[ "]\.)(?:\[([a-z0-9,]*)\])?["\s]""")
EXTRAS = {
    f"{file.relative_to(ROOT)}: {found[1]}": tuple((found[1] or "").split(","))
    for file in [TPU / "worker.sh", TPU / "gke" / "Dockerfile", TPU / "README.md"]
    for found in INSTALL.finditer(file.read_text())
}
OPENS = """
import importlib.metadata as metadata, json, sys
from pathlib import Path
from packaging.requirements import Requirement

# The distributions that these requirements bring, as far as they are installed here.
todo, allowed = [Requirement(each) for each in json.loads(sys.argv[1])], set()
while todo:
    one = todo.pop()
    key = (one.name.lower().replace("_", "-"), frozenset(one.extras))
    if key in allowed:
        continue
    allowed.add(key)
    try:
        wants = [Requirement(each) for each in metadata.requires(one.name) or ()]
    except metadata.PackageNotFoundError:
        continue
    todo += [w for w in wants if w.marker is None or any(w.marker.evaluate({"extra": e}) for e in ("", *one.extras))]
names = {name for name, _ in allowed} | {"tsopsd-jax"}
homes = metadata.packages_distributions()

class OnlyThose:
    def find_spec(self, module, *_):
        homes_of = [home.lower().replace("_", "-") for home in homes.get(module, ())]
        if homes_of and names.isdisjoint(homes_of):
            raise ModuleNotFoundError(f"No module named {module!r}: not among what is installed", name=module)

sys.meta_path.insert(0, OnlyThose())
from tsopsd_jax.rundir import object_store
print(object_store.folder_of("gs://bu/runs/x", Path(sys.argv[2])))
"""


def requirements(extras: tuple[str, ...]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]


def test_workers_and_image_install_the_accelerator_and_the_store():
    assert len(EXTRAS) == 3, "worker.sh, the image, and the README's command to read a run"
    for place, extras in EXTRAS.items():
        assert any(each.startswith("gcsfs") for each in requirements(extras)), place
        if "README" not in place:
            assert any(each.startswith("jax[tpu]") for each in requirements(extras)), place


@pytest.fixture
def store():
    """(address, paths): a stand-in for Cloud Storage that holds nothing; the paths that it was asked for."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error": {"code": 404, "message": "Not Found"}}')

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        yield address, paths


@pytest.mark.parametrize(
    ("extras", "reached"), [*((extras, True) for extras in sorted(set(EXTRAS.values()))), (("tpu",), False)]
)
def test_what_is_installed_opens_a_bucket_and_nothing_less_does(store, tmp_path, extras, reached):
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed (extra dev)")
    address, paths = store
    env = os.environ | {"STORAGE_EMULATOR_HOST": f"http://{address}", "PYTHONPATH": str(ROOT)}
    env |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # would look for credentials first
    opened = subprocess.run(
        [sys.executable, "-c", OPENS, json.dumps(requirements(extras)), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if reached:
        assert opened.returncode == 0, opened.stderr
        assert any("/b/bu/o" in path for path in paths), "the real client asked the store"
    else:
        assert 'for gs:// pip install "tsopsd-jax[gcs]"' in opened.stderr
        assert paths == []


# -------------------------------------------------------------------- on a worker


@pytest.fixture
def worker(cloud, tmp_path):
    """run(*arguments): worker.sh as it stands on a worker, ~/tsopsd/code/tpu/worker.sh."""
    code = tmp_path / "tsopsd" / "code"
    shutil.copytree(TPU, code / "tpu")
    for name in ("python3", "sudo", "systemctl"):
        cloud.stub(name)
    python = tmp_path / "tsopsd" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase $1 in -c) ;; *) exec "{sys.executable}" "$@" ;; esac\n')
    python.chmod(0o755)
    cloud.answer("systemctl is-active", *[(3, "")] * 9)  # inactive
    return lambda *arguments: cloud.run(code / "tpu" / "worker.sh", *arguments)


def test_a_worker_is_set_up_with_a_python_of_its_own(cloud, worker, tmp_path):
    base = tmp_path / "tsopsd"
    assert worker("status", "x").stdout == "tsopsd-status bare\n"
    done = worker("setup", "gs://bu/as")
    assert done.returncode == 0, done.stderr
    assert cloud.calls[1:] == [
        "python3 -m pip install --quiet --user --upgrade uv",
        f"python3 -m uv venv --quiet --allow-existing --python 3.12 {base}/venv",
        f"python3 -m uv pip install --quiet --python {base}/venv/bin/python --editable {base}/code[tpu,gcs]",
        f"gcloud storage rsync --recursive gs://bu/as {base}/assets",
    ]
    assert (base / "code" / "models").readlink() == base / "assets" / "models"
    assert worker("status", "x").stdout == "tsopsd-status none\n"


def test_a_worker_whose_installation_failed_stays_bare(cloud, worker):
    cloud.answer("uv pip install", (1, "no such version"))
    assert worker("setup").returncode == 1
    assert worker("status", "x").stdout == "tsopsd-status bare\n"
    done = worker("start", "x")
    assert done.returncode == 2
    assert "not set up; run setup.sh" in done.stderr


def test_a_command_is_started_as_a_service_and_its_exit_code_is_told(cloud, worker, tmp_path):
    state = tmp_path / "tsopsd" / "state"
    assert worker("setup").returncode == 0
    assert worker("start", "sh", "-c", "exit 3").returncode == 0
    call = json.loads(cloud.calls_file.read_text().splitlines()[-1])
    assert call[:2] == ["sudo", "systemd-run"]
    assert {"--unit=tsopsd", "--property=KillMode=mixed", "--property=TimeoutStopSec=10min"} < set(call)
    service = call[next(i for i, word in enumerate(call) if word.endswith("/python")) :]
    assert worker("status", "sh", "-c", "exit 3").stdout == "tsopsd-status none\n"
    assert subprocess.run(service, env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": "127.0.0.1:9"}).returncode == 3
    assert (state / "exit_code").read_text().split() == ["3"]
    assert worker("status", "sh", "-c", "exit 3").stdout == "tsopsd-status 3\n"
    assert worker("status", "another").stdout == "tsopsd-status none\n"  # the code of another command says nothing
    assert worker("start", "sh", "-c", "exit 3").returncode == 0
    assert not (state / "exit_code").exists()  # nor does that of the last time


def test_a_command_that_runs_is_not_started_twice(cloud, worker):
    assert worker("setup").returncode == 0
    cloud.answers = [("systemctl is-active", 0, "")] * 2
    assert worker("status", "x").stdout == "tsopsd-status running\n"
    assert "a run is going on here" in worker("start", "x").stderr


def test_a_worker_stops_its_run_and_remembers_that_it_was_asked_to(cloud, worker, tmp_path):
    state = tmp_path / "tsopsd" / "state"
    assert worker("setup").returncode == 0
    assert "no run is going on here" in worker("stop").stderr
    assert worker("start", "x").returncode == 0
    (state / "exit_code").write_text("4\n\n")  # as the supervisor leaves it, once systemctl has returned
    cloud.answers.insert(0, ("systemctl is-active", 0, ""))
    done = worker("stop")
    assert done.returncode == 0, done.stderr
    assert "ended with 4" in done.stdout
    assert cloud.calls[-1] == "sudo systemctl stop tsopsd"
    cloud.answers.pop(0)
    assert worker("status", "x").stdout == "tsopsd-status stopped\n"
    (state / "exit_code").write_text("0\n")  # it was done before it could stop
    assert worker("status", "x").stdout == "tsopsd-status 0\n"
    assert worker("start", "x").returncode == 0
    (state / "exit_code").write_text("4\n")
    assert worker("status", "x").stdout == "tsopsd-status 4\n", "a preemption after a new start"


def test_the_smoke_test_is_a_service_that_is_waited_for(cloud, worker):
    assert "not set up" in worker("smoke", "gs://bu/r", "--devices", "4").stderr
    assert worker("setup").returncode == 0
    assert worker("smoke", "gs://bu/r", "--devices", "4").returncode == 0
    call = json.loads(cloud.calls_file.read_text().splitlines()[-1])
    assert {"--unit=tsopsd-smoke", "--wait", "--pipe", "--property=LimitMEMLOCK=infinity"} < set(call)
    assert call[-4].endswith("/tsopsd/code/tpu/smoke.py")
    assert call[-3:] == ["gs://bu/r", "--devices", "4"]
    cloud.answers = [("systemctl is-active", 0, "")]
    assert "a run is going on here" in worker("smoke", "gs://bu/r", "--devices", "4").stderr


def smoke(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(TPU / "smoke.py"), *arguments], env=env, cwd=tmp_path, capture_output=True, text=True
    )


def test_the_toy_trains_on_all_devices_and_leaves_nothing(tmp_path):
    done = smoke(tmp_path, str(tmp_path / "runs" / "a"), "--devices", "2", "--platform", "cpu")
    assert done.returncode == 0, done.stderr
    for phase in ("rl", "reheat"):
        assert f"phase '{phase}' ends at step" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


def test_too_few_devices_and_a_place_that_cannot_be_written_are_one_line(tmp_path):
    done = smoke(tmp_path, str(tmp_path / "a"), "--devices", "4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tsopsd smoke: expected 4 devices of tpu, got 2 of cpu" in done.stderr
    (tmp_path / "file").touch()
    done = smoke(tmp_path, str(tmp_path / "file" / "a"), "--devices", "2", "--platform", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected to write, read and delete there, got FileExistsError" in done.stderr


def test_a_dry_run_on_a_worker_runs_nothing(cloud, worker, tmp_path):
    for verb in (("setup", "gs://bu/as"), ("smoke", "gs://bu/r"), ("start", "x"), ("stop",)):
        done = worker("--dry-run", *verb)
        assert done.returncode == 0
        assert done.stdout
    assert cloud.calls == []
    assert not (tmp_path / "tsopsd" / "state").exists()


# --------------------------------------------------------------------- preemption


@pytest.fixture
def supervisor(monkeypatch):
    spec = importlib.util.spec_from_file_location("supervise", TPU / "supervise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def metadata():
    """(host:port, values): a metadata server; values[key] may be changed; it refuses requests without the header."""
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            allowed = self.headers["Metadata-Flavor"] == "Google" and key in values
            self.send_response(200 if allowed else 403)
            self.end_headers()
            self.wfile.write((values[key] if allowed else "no").encode())

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        yield address, values


# Like a run: it answers SIGTERM by finishing what it does, and ends with 4; a second signal would be fatal to it.
RUN = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("stepping", flush=True)
until = time.monotonic() + 120
while not asked and time.monotonic() < until: time.sleep(0.01)
time.sleep(0.4)
print("signals:", len(asked), flush=True)
sys.exit(4 if len(asked) == 1 else 1)
"""


def later(state: Path, act) -> None:
    """Act when the command has begun."""

    def wait():
        log = state / "train.log"
        while not (log.exists() and "stepping" in log.read_text()):
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_becomes_one_sigterm(supervisor, metadata, tmp_path, key, value):
    host, values = metadata
    later(tmp_path, lambda: values.update({key: value}))
    assert supervisor.supervise([sys.executable, "-c", RUN], tmp_path, host) == 4
    log = (tmp_path / "train.log").read_text()
    assert f"{key} is {value}" in log
    assert "signals: 1" in log


def test_shutdown_and_notice_together_are_still_one_sigterm(supervisor, metadata, tmp_path):
    host, values = metadata

    def both():
        values["preempted"] = "TRUE"
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    later(tmp_path, both)
    assert supervisor.supervise([sys.executable, "-c", RUN], tmp_path, host) == 4


@pytest.mark.parametrize("host", ["127.0.0.1:9", None])
def test_without_a_notice_the_command_is_left_alone(supervisor, metadata, tmp_path, host):
    """A metadata server that says nothing new (None: the fixture's), and one that does not answer."""
    quiet, values = metadata
    values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # a pause, not an end
    assert supervisor.supervise(["sh", "-c", "sleep 0.3; exit 7"], tmp_path, host or quiet) == 7
    assert supervisor.supervise(["sh", "-c", "kill -9 $$"], tmp_path, host or quiet) == 137
    assert (tmp_path / "train.log").read_text() == ""


@pytest.mark.parametrize(
    ("code", "says"), [(2, "bad input"), (3, "a guard"), (5, "another process"), (6, "could not write")]
)
def test_the_log_says_what_an_exit_code_means(supervisor, tmp_path, code, says):
    assert supervisor.supervise(["sh", "-c", f"exit {code}"], tmp_path, "127.0.0.1:9") == code
    assert says in (tmp_path / "train.log").read_text()


def test_a_full_disk_does_not_hide_the_exit_code(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    command = [sys.executable, str(TPU / "supervise.py"), str(tmp_path), "sh", "-c", "echo x; exit 6"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": "127.0.0.1:9"})
    assert done.returncode == 6
    assert (tmp_path / "exit_code").read_text().split() == ["6"]

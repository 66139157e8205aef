"""Stubs of gcloud, kubectl and a worker's tools that record what they are asked and give prepared answers.

They stand alone on PATH, so that no real gcloud or kubectl can be reached from the tests of tpu/.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *TPU.glob("gke/*.sh")])
RUNNABLE = [s for s in SCRIPTS if s.name != "common.sh"]
TOOLS = "bash env cat dirname grep hostname id ln mkdir mktemp mv rm sed sleep touch tr wc"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACE = ("--name", "a", "--zone", "us-east5-a")
TRAIN = ("--", "tsopsd", "train", "c.yaml", "--run-dir", "gs://bu/r", "--set", "x=a b")

# Records its words, then gives the first answer not yet given whose pattern occurs in them.
STUB = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
words = [name, *sys.argv[1:]]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
for word in words:
    if word.startswith("--filename="):
        Path(os.environ["CALLS"]).with_name("manifest.yaml").write_text(Path(word[11:]).read_text())
file = Path(os.environ["CALLS"]).with_name("answers.json")
answers = json.loads(file.read_text())
for i, (pattern, code, out) in enumerate(answers):
    if pattern in " ".join(words):
        del answers[i]
        file.write_text(json.dumps(answers))
        if out:
            print(out, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
if "describe" in words:
    print("FAILED")  # no answer left: a state that ends every wait
"""
ABSENT = (1, "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/nodes/a' was not found")


class Cloud:
    """A PATH with the stubs; the answers they give; the calls they got."""

    def __init__(self, folder: Path):
        self.bin, self.calls_file, self.answers_file = folder / "bin", folder / "calls", folder / "answers.json"
        self.bin.mkdir()
        for tool in TOOLS.split(" "):
            found = shutil.which(tool)
            assert found, f"{tool} is not installed"
            (self.bin / tool).symlink_to(found)
        for name in ("gcloud", "kubectl", "git"):
            self.stub(name)
        self.answers: list[tuple[str, int, str]] = [("rev-parse", 0, COMMIT)]

    def stub(self, name: str) -> None:
        (self.bin / name).write_text(STUB)
        (self.bin / name).chmod(0o755)

    def answer(self, pattern: str, *codes_and_outputs: tuple[int, str] | str) -> None:
        """What the next calls with `pattern` in them give: stdout, or (exit code, stderr)."""
        self.answers += [(pattern, *((0, each) if isinstance(each, str) else each)) for each in codes_and_outputs]

    def env(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "CALLS": str(self.calls_file), "TPU_POLL_S": "0", "HOME": "/nowhere"} | more

    def run(self, script: str | Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.answers_file.write_text(json.dumps(self.answers))
        command = [str(self.bin / "bash"), str(TPU / script), *arguments]
        return subprocess.run(
            command, env=self.env(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )

    @property
    def calls(self) -> list[str]:
        """The calls but for git's, temporary folders as TMP, long remote commands by their first words."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [short(json.loads(line)) for line in lines if json.loads(line)[0] != "git"]


def short(words: list[str]) -> str:
    words = [w for w in words if not w.startswith("--zone=")]
    if words[:3] == ["gcloud", "compute", "tpus"]:
        words = words[3:]
    remote = {
        "tsopsd/code/tpu/worker.sh start": "START",
        "tsopsd/code/tpu/worker.sh smoke": "SMOKE",
        "if [ -x": "STATUS",
        "! systemctl": "SETUP",
    }
    for i, word in enumerate(words):
        for begin, name in remote.items():
            if word.startswith(f"--command={begin}"):
                words[i] = name
        if word.endswith("/tsopsd.tar.gz"):
            words[i] = "TMP/tsopsd.tar.gz"
    return " ".join(words)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """HOST:PORT of a server that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


DESCRIBE = "tpu-vm describe a --format=value(state)"
DESCRIBE_QUEUED = "queued-resources describe a --format=value(state.state)"
CREATE = "tpu-vm create a --accelerator-type=v5p-64 --version=v2-alpha-tpuv5"
ASK = "tpu-vm ssh a --worker=all STATUS"
START = "tpu-vm ssh a --worker=all START"
SMOKE = "tpu-vm ssh a --worker=all SMOKE"
SET_UP = ["tpu-vm scp TMP/tsopsd.tar.gz a: --worker=all", "tpu-vm ssh a --worker=all SETUP", SMOKE, START]


RESUME = (*PLACE, "--type", "v5p-64")


def words(*each: str) -> str:
    """What gcloud prints when the workers say these."""
    return "\n".join(["SSH: Attempting to connect to worker 0...", *(f"tsopsd-status {word}" for word in each)])

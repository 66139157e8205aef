"""Run a command on a TPU VM: a notice that the machine will go becomes one SIGTERM to it;
its exit code is kept in a file.

    supervise.py STATE_DIR COMMAND...

The notices are the metadata server's (preemption, host maintenance) and a SIGTERM to this process (systemd's, when the
machine is being shut down). They come together, and to `tsopsd` a second signal means "do not wait": hence at most one
is passed on. Needs nothing but Python.
"""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
"""Keys under computeMetadata/v1/instance and the value that announces the end."""
POLL_S = 1.0
ENDS = {
    2: "bad input; it is not started again: mend it, then run.sh",
    3: "a guard stopped the run; it is not started again: read why, then run.sh",
    4: "interrupted and saved; the same command resumes it",
    5: "another process of the run died, or this one hung; started again, it resumes",
    6: "it could not write, as where a disk is full; it is not started again: make room, then run.sh",
}
"""What `tsopsd` says by its exit code, and what `resume.sh` makes of it."""


def read_metadata(host: str, key: str) -> str | None:
    """Return the value of a key under `instance`; None if the server does not answer."""
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is never behind a proxy
    try:
        with opener.open(request, timeout=2 * POLL_S) as answer:
            return answer.read().decode().strip()
    except OSError:
        return None


def notice(host: str) -> str | None:
    """Return why the machine is about to go, or None."""
    return next((f"{key} is {value}" for key, value in NOTICES.items() if read_metadata(host, key) == value), None)


def supervise(command: list[str], state: Path, host: str) -> int:
    """Run the command to its end; returns its exit code (128 + the signal that killed it)."""
    signals: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: signals.append("SIGTERM"))
    asked = False
    with (state / "train.log").open("ab", buffering=0) as log:

        def say(text: str) -> None:
            with contextlib.suppress(OSError):  # a full disk must not hide the exit code
                log.write(f"supervise: {text}\n".encode())

        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(POLL_S)
                break
            if not asked and (why := signals[0] if signals else notice(host)):
                asked = True
                say(f"{why}: asking the command to save and stop")
                child.send_signal(signal.SIGTERM)
        if code in ENDS:
            say(f"exit code {code}: {ENDS[code]}")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    unfinished = folder / "exit_code.tmp"
    unfinished.write_text("\n" * 4)  # room that is left even where the command fills the disk
    exit_code = supervise(sys.argv[2:], folder, os.environ.get("GCE_METADATA_HOST", "metadata.google.internal"))
    with unfinished.open("r+") as reserved:
        reserved.write(f"{exit_code}\n")
    unfinished.replace(folder / "exit_code")
    sys.exit(exit_code)

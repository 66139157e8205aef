"""The processes of a run watch one another, and end together.

A process that is killed leaves the others waiting in a collective. JAX notices after its own heartbeat and aborts with
exit code 134 and the text of a remote call; it does not hear of an exception at all. So each process holds a connection
to process 0: one that closes without a farewell, stays silent for the heartbeat, or brings an error ends every process,
with a sentence that says which process it was and what to do, and with exit code 5.

A process that hangs (a read from a store that never ends, a collective that nobody else enters) still sends its signs
of life, from the thread that watches. So the main thread says by `tick` what it does. After a minute without a tick the
watch says which process waits for what; after `stall_s` it ends the process, with all stacks and exit code 5. One
process alone is watched in the same way.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_OTHERS = 5
"""Exit code of a process that ends because another one died or failed, or because it hung itself."""
GRACE_S = 2.0
"""Time, after another process reported an error, to meet the same error oneself and to end with its exit code."""
CONNECT_S = 60.0
NOTICE_S = 60.0
"""Time without a tick until the watch says what the main thread is doing."""
REMEDY = "start all processes again with the same command: the run goes on from its last checkpoint"


class _Main:
    """State of the main thread: what it does, how often it said so, and the file in which a stall is reported."""

    doing = "starting"
    ticks = 0
    report: Path | None = None
    listener: Callable[[str], None] | None = None


def tick(doing: str | None = None) -> None:
    """Say that the main thread makes progress.

    Call it from the main thread, at least once in every `stall_s`. A compilation, or a step in one program, has no tick
    inside, and must be shorter.

    Args:
        doing: what it does from now on, such as "restoring a checkpoint"; None: the same as before.
    """
    _Main.ticks += 1
    if doing is not None:
        _Main.doing = doing
        if _Main.listener is not None:
            _Main.listener(doing)


@contextlib.contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside the block let `listener` hear, in the main thread, what that thread says that it does."""
    before, _Main.listener = _Main.listener, listener
    try:
        yield
    finally:
        _Main.listener = before


@contextlib.contextmanager
def within(part: str) -> Iterator[None]:
    """Say `... (part)` of what the main thread does, inside the block."""
    before = _Main.doing
    tick(f"{before} ({part})")
    try:
        yield
    finally:
        tick(before)


def report_stalls(file: Path | None) -> None:
    """Write what the main thread waits for, with the stacks of all threads, to `file`; it is removed
    when the thread goes on. None: nowhere."""
    _Main.report = file
    _clear_report()


def _write_report(text: str) -> None:
    if _Main.report is not None:
        with contextlib.suppress(OSError), _Main.report.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC {text}\n")
            file.flush()
            faulthandler.dump_traceback(file)


def _clear_report() -> None:
    if _Main.report is not None:
        with contextlib.suppress(OSError):
            _Main.report.unlink(missing_ok=True)


class Watch:
    """Watch over the processes of a run, in a thread, until it is closed. All processes make one together.

    Args:
        index, count: of this process, and how many there are.
        heartbeat_s: silence after which a process is taken for dead.
        stall_s: time without a `tick` after which this process ends; 0: never.
        exchange: value -> the values of all processes, in order.

    Raises:
        ConnectionError: this process cannot reach process 0.
    """

    def __init__(
        self, *, index: int, count: int, heartbeat_s: float, stall_s: float, exchange: Callable[[Any], list[Any]]
    ):
        self.index, self.heartbeat_s, self.stall_s = index, heartbeat_s, stall_s
        self.notice_s = min(NOTICE_S, stall_s / 2) if stall_s else NOTICE_S
        self.waited_s = 0.0
        """Time since the main thread's last tick."""
        tick()
        self.names = exchange(f"process {index} of {count} (host {socket.gethostname()}, pid {os.getpid()})")
        self.peers = self._accept(count, exchange) if index == 0 else {0: self._connect(exchange)}
        self.doomed = threading.Event()
        """Event that is set once another process is known to have died or failed: this one is about to end."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def _accept(self, count: int, exchange: Callable[[Any], list[Any]]) -> dict[int, socket.socket]:
        token, peers = secrets.token_hex(8), {}
        with socket.create_server(("", 0), backlog=count) as server:
            exchange({"addresses": _addresses(), "port": server.getsockname()[1], "token": token})
            server.settimeout(CONNECT_S)
            while len(peers) < count - 1:
                peer, _ = server.accept()
                peer.settimeout(CONNECT_S)
                # Unbuffered: what follows the greeting, such as a farewell, is for the watch to read.
                hello = peer.makefile("rb", buffering=0).readline().decode(errors="replace").split()
                if len(hello) == 2 and hello[0] == token:
                    peers[int(hello[1])] = peer
                else:
                    peer.close()  # a stranger
        return peers

    def _connect(self, exchange: Callable[[Any], list[Any]]) -> socket.socket:
        first = exchange(None)[0]
        for address in first["addresses"]:
            try:
                peer = socket.create_connection((address, first["port"]), timeout=CONNECT_S / 4)
            except OSError:
                continue
            peer.sendall(f"{first['token']} {self.index}\n".encode())
            return peer
        raise ConnectionError(
            f"{self.names[self.index]} expected to reach {self.names[0]} at one of {', '.join(first['addresses'])}, "
            f"port {first['port']}, got no answer; let the hosts reach one another over TCP"
        )

    def tell(self, error: str) -> None:
        """Let the others know that this process ends because of `error`, and let them go first.

        Process 0 must not be the first to go: JAX's service ends with it, and aborts the others at once.
        """
        self._stop()
        self._send({"failed": f"{self.names[self.index]} failed: {error}"})
        self._part()

    def close(self) -> None:
        """Take leave: from now on this process may go."""
        self._stop()
        self._send("bye")
        self._part()

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _part(self) -> None:
        """Close all connections in order: stop sending, and read until the other side has stopped, too.

        A connection that is closed over unread bytes is reset, and what was sent last is lost. So process 0 also lets
        the others go first.
        """
        until = time.monotonic() + 2 * GRACE_S
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                peer.settimeout(left)
                if not _receive(peer):
                    break
            peer.close()

    def _send(self, message: Any) -> None:
        for peer in list(self.peers.values()):
            with contextlib.suppress(OSError):  # it is gone; reading from it tells
                peer.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self) -> None:
        pause = min(1.0, self.heartbeat_s / 4, self.notice_s / 4)
        ticks = _Main.ticks
        silent_s = dict.fromkeys(self.peers, 0.0)
        looked = time.monotonic()
        rest = dict.fromkeys(self.peers, b"")
        beaten = 0.0
        with selectors.DefaultSelector() as selector:
            for number, peer in self.peers.items():
                peer.settimeout(pause)
                selector.register(peer, selectors.EVENT_READ, number)
            while not self._over.is_set():
                if time.monotonic() - beaten >= pause:
                    self._send("alive")
                    beaten = time.monotonic()
                if not self.peers:
                    self._over.wait(pause)
                for key, _ in selector.select(pause if self.peers else 0):
                    data = _receive(self.peers[key.data])
                    if not data:
                        self._end(f"{self.names[key.data]} died")
                    silent_s[key.data] = 0.0
                    *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
                    if any(self._hear(json.loads(line)) for line in lines):
                        selector.unregister(self.peers[key.data])
                        self.peers.pop(key.data).close()
                        del silent_s[key.data]
                # A pause of this process (a machine that is moved or overloaded) is no silence of the others.
                now = time.monotonic()
                passed, looked = min(now - looked, 2 * pause), now
                for number in silent_s:
                    silent_s[number] += passed
                    if silent_s[number] > self.heartbeat_s:
                        self._end(f"{self.names[number]} gave no sign of life for {self.heartbeat_s:g} s")
                if ticks != _Main.ticks:
                    if self.waited_s >= self.notice_s:
                        _clear_report()
                    ticks, self.waited_s = _Main.ticks, 0.0
                else:
                    self._wait(passed)

    def _wait(self, passed_s: float) -> None:
        """Count `passed_s` more without a tick; give notice, or end the process, when it is time."""
        noticed, self.waited_s = self.waited_s >= self.notice_s, self.waited_s + passed_s
        if self.stall_s and self.waited_s >= self.stall_s:
            reason = f"{self.names[self.index]} hangs: {_Main.doing} for {self.waited_s:.0f} s (--stall-s)"
            self._end(reason, tell=True)
        if not noticed and self.waited_s >= self.notice_s:
            until = f"; it ends after {self.stall_s:g} s (--stall-s)" if self.stall_s else ""
            text = f"{self.names[self.index]} waits: {_Main.doing} for {self.waited_s:.0f} s{until}"
            print(text, file=sys.stderr, flush=True)
            _write_report(text)
            if self.index:
                self._send({"doing": _Main.doing, "waits": text})

    def _hear(self, message: Any) -> bool:
        """Act on a message of another process; returns whether it was a farewell."""
        if isinstance(message, dict) and "waits" in message:  # told to process 0, whose log is the one that is read
            if message["doing"] != _Main.doing:
                print(message["waits"], file=sys.stderr, flush=True)
            return False
        if isinstance(message, dict):
            self.doomed.set()
            if self.index == 0:
                self._send(message)
            time.sleep(GRACE_S)
            self._end(message["failed"])
        return message == "bye"

    def _end(self, reason: str, *, tell: bool = False) -> None:
        self.doomed.set()
        print(f"{self.names[self.index]} ends: {reason}; {REMEDY}", file=sys.stderr, flush=True)
        if self.waited_s >= self.notice_s:  # it hangs itself, or waits for the one that does
            faulthandler.dump_traceback(2)
            _write_report(f"{self.names[self.index]} ended: {reason}; {REMEDY}")
        if tell or self.index == 0:
            self._send({"failed": reason})
            self._part()
        sys.stdout.flush()
        os._exit(EXIT_OTHERS)


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except OSError:  # reset by a process that was killed
        return b""


def _addresses() -> list[str]:
    """Return where others may find this host: its name, the address of its default route, and the loopback."""
    found = [socket.gethostname()]
    # No route: all processes are on this host.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only picks a route
        found.insert(0, probe.getsockname()[0])
    return [*found, "127.0.0.1"]

"""Lives of a Python program that start in milliseconds: torch is imported once, and each life is a fork of that.

A life is a process of its own, killed by real signals, and runs the program as `__main__` from its first line. What it
skips is imports. Nothing else has happened in the process that it is forked from: no operator ran, no thread was
started, no generator was drawn from, no device was opened. What is random in a fresh process is random in it too: the
generators that Python and numpy seed from the system are seeded anew, and lives are forked from several processes in
turn, whose hashes and addresses differ.

Touches: processes that it starts itself, a temporary directory with their sockets. `python -m unbroken.forks SOCKET`
is such a server; `fork_client.py` is what stands for a life.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_CLIENT = Path(__file__).with_name("fork_client.py")
SERVERS = 2


@contextlib.contextmanager
def serving(environment: Mapping[str, str]) -> Iterator[list[str]]:
    """Start servers and yield the command that, with a script and its arguments behind it, is one life.

    Args:
        environment: The whole environment. What is read when torch is imported is read once.

    Raises:
        RuntimeError: A server did not start; its message has what it said.
    """
    # The address of a socket has room for about a hundred characters.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="unbroken-forks-", dir=base) as directory:
        sockets = [str(Path(directory, str(index))) for index in range(SERVERS)]
        turns = Path(directory, "turns")
        turns.touch()
        servers = [_start(path, environment) for path in sockets]
        try:
            for server in servers:
                _await_ready(server)
            yield [sys.executable, "-I", "-S", str(_CLIENT), str(turns), *sockets, "--"]
        finally:
            for server in servers:
                server.kill()
                server.communicate()


def _start(path: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "unbroken.forks", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )


def _await_ready(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None, "its output is piped"
    if server.stdout.readline().strip() != "ready":
        _, said = server.communicate()
        raise RuntimeError(f"no process to fork lives from: {said.strip().rpartition(chr(10))[2]}")


@dataclass
class _Life:
    pid: int
    client: socket.socket


class _Server:
    """Forks a life for each client that connects, kills it when its client dies, and tells the client how it ended."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lives: dict[int, _Life] = {}
        # The end of a life wakes the loop up.
        self._bell, ring = socket.socketpair()
        for end in (self._bell, ring):
            end.setblocking(False)
        self._ring = ring
        signal.set_wakeup_fd(ring.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._bell, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """Answer for ever; in a forked life, return what the client asked for."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj is self._bell:
                    self._bell.recv(4096)
                else:
                    self._client_gone(key.data)
            self._reap()

    def _accept(self) -> dict[str, Any] | None:
        client, _ = self._listener.accept()
        data, descriptors, _, _ = socket.recv_fds(client, 8, 3)
        length = int.from_bytes(data, "little")
        request = json.loads(client.makefile("rb").read(length))
        pid = os.fork()
        if pid == 0:
            self._become_child(client, descriptors)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        self._lives[pid] = _Life(pid, client)
        self._selector.register(client, selectors.EVENT_READ, pid)
        return None

    def _become_child(self, client: socket.socket, descriptors: Sequence[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for held in (
            self._listener,
            self._bell,
            self._ring,
            client,
            *(life.client for life in self._lives.values()),
        ):
            held.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)

    def _client_gone(self, pid: int) -> None:
        # Nothing is ever sent after the request: the end of the stream means that the client was killed.
        life = self._lives[pid]
        self._selector.unregister(life.client)
        os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        for pid, life in list(self._lives.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._lives[pid]
                with contextlib.suppress(OSError):
                    life.client.send(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(life.client)
                life.client.close()


def _become(request: Mapping[str, Any]) -> None:
    """Run the program in this forked process as a fresh interpreter would."""
    import random

    import numpy.random

    random.seed()
    numpy.random.seed()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    script = request["arguments"][0]
    sys.argv = list(request["arguments"])
    sys.path[0] = str(Path(script).resolve().parent)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def _main() -> None:
    # Here alone: whoever starts a server has no torch to import.
    from .torch import preload

    preload.everything()
    server = _Server(sys.argv[1])
    print("ready", flush=True)
    request = server.serve()
    if request is not None:
        _become(request)


if __name__ == "__main__":
    _main()

"""Stands for one life that a server of `forks.py` forks: ends as the life ends, and takes it along when it is killed.

Touches: one socket. Run by its path in an isolated interpreter, so that it starts quickly: imports nothing of ours.
"""

import json
import os
import resource
import signal
import socket
import sys


def main() -> None:
    """TURNS SOCKET... -- SCRIPT ARGUMENT..."""
    split = sys.argv.index("--")
    turns, *sockets = sys.argv[1:split]
    with open(turns, "ab") as file:  # noqa: PTH123
        file.write(b".")
        file.flush()
        turn = os.fstat(file.fileno()).st_size
    server = socket.socket(socket.AF_UNIX)
    server.connect(sockets[turn % len(sockets)])
    request = {
        "arguments": sys.argv[split + 1 :],
        "environment": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109
    }
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(data)
    answer = server.recv(4)
    code = int.from_bytes(answer, "little", signed=True) if len(answer) == 4 else 1
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)


main()

"""Starts lives quickly: imports torch once, and forks a child for each request.

A child is a process of its own: own session, own files for its output, killed by real signals, and it runs
the script as `__main__` from its first line. What it skips is only the import of torch, about two seconds.
Nothing but imports has happened in the parent: no generator was used, no thread was started, no run was
opened.

Reads requests from stdin, one JSON object a line; answers each with one line on stdout.
"""

import json
import os
import resource
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def preload() -> None:
    import numpy.random  # noqa: F401
    import torch._dynamo
    import torch.optim.lr_scheduler
    import torch.utils.data  # noqa: F401

    import unbroken.run  # noqa: F401


def become(request: Mapping[str, Any]) -> None:
    """Turn this forked child into a life of the script; return or raise when that ends."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.update(request["environment"])
    if "directory" in request:
        os.chdir(request["directory"])
    if "file_size_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"], resource.RLIM_INFINITY))
    if "user" in request:
        os.setgid(request["user"])
        os.setuid(request["user"])
    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def serve() -> None:
    """Answer until stdin ends. In a child, returns after the life is over."""
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                become(request)
                return
            answer: Any = pid
        else:
            pid = request["pid"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    preload()
    print(json.dumps("ready"), flush=True)
    serve()

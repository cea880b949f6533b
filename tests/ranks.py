"""A reused pool of real gloo ranks: a multi-rank test costs milliseconds.

PyTorch must be forked before it has run any OpenMP work, so one small server process is forked when the test
session starts (conftest.py). It forks the ranks of a pool on request; a pool lives until a rank fails, then
the next request makes a new one.

    parent (pytest) --fork--> server --fork--> rank 0 .. W-1, one gloo group

Tasks and results go over local sockets.
"""

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 60
"""A collective that hangs this long is an error in every rank.

The parent waits a little longer, then ends the pool.
"""


def serve(address: str, requests: Connection) -> None:
    """The server process: fork a pool of ranks for each request (world, rendezvous file)."""
    # what the first mesh, attention and model would import: once here, not in every rank
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import seqmesh.parallel  # noqa: F401

    while True:
        try:
            world, rendezvous = requests.recv()
        except EOFError:
            return
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                try:
                    work(address, rank, world, rendezvous)
                finally:
                    os._exit(0)
            pids.append(pid)
        requests.send(pids)


def work(address: str, rank: int, world: int, rendezvous: str) -> None:
    """One rank: run tasks until the parent goes away."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    parent = Client(address, "AF_UNIX")
    parent.send(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    while True:
        try:
            task = parent.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(task)
            parent.send((True, function(*args)))
        except BaseException as error:
            parent.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Pool(NamedTuple):
    """The ranks of one world, in their order."""

    pids: list[int]
    connections: list[Connection]


class Ranks:
    """Pools of 1, 2, 4, 8, ... ranks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="seqmesh-ranks-", ignore_cleanup_errors=True)
        self._address = str(Path(self._folder.name) / "socket")
        self._listener = Listener(self._address, "AF_UNIX", backlog=64)
        self._pools: dict[int, Pool] = {}
        self._made = 0
        self._requests, theirs = Pipe()
        self._server = os.fork()
        if self._server == 0:
            self._requests.close()
            try:
                serve(self._address, theirs)
            finally:
                os._exit(0)
        theirs.close()

    def _pool(self, world: int) -> list[Connection]:
        if world not in self._pools:
            self._made += 1
            self._requests.send((world, str(Path(self._folder.name) / f"rendezvous{self._made}")))
            pids = self._requests.recv()
            connections: dict[int, Connection] = {}
            for _ in range(world):
                connection = self._listener.accept()
                connections[connection.recv()] = connection
            self._pools[world] = Pool(pids, [connections[rank] for rank in range(world)])
        return self._pools[world].connections

    def end(self) -> None:
        """End every pool; the next request makes a new one.

        gloo's groups have threads that wake a hundred times a second, whether or not anybody uses them. Ranks
        that have made hundreds of groups leave no time for the tests that follow.
        """
        for world in list(self._pools):
            self._end(world)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank of a pool; its results by rank.

        Raises:
            RuntimeError: a rank failed or died; with its traceback.
            TimeoutError: ranks did not answer.
        """
        connections = self._pool(world)
        task = pickle.dumps((function, args))
        for connection in connections:
            connection.send_bytes(task)
        results: dict[int, Any] = {}
        while len(results) < world:
            missing = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = wait(missing, TIMEOUT_SECONDS + 30)
            if not ready:
                self._end(world)
                late = sorted(set(range(world)) - set(results))
                raise TimeoutError(f"ranks {late} of {world} did not answer")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    ok, result = connection.recv()
                except EOFError:
                    ok = False
                    result = "the process died"
                if not ok:
                    self._end(world)
                    raise RuntimeError(f"rank {rank} of {world}: {result}")
                results[rank] = result
        return [results[rank] for rank in range(world)]

    def _end(self, world: int) -> None:
        pids, connections = self._pools.pop(world)
        for pid in pids:
            os.kill(pid, 9)
        for connection in connections:
            connection.close()

    def close(self) -> None:
        """End every process."""
        for world in list(self._pools):
            self._end(world)
        self._requests.close()
        os.waitpid(self._server, 0)
        self._listener.close()
        self._folder.cleanup()

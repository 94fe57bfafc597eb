"""Tensor parallelism from one command: the process that the user started is rank 0, and starts the others of its machine."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import distributed as dist

from medusa.checkpoints import named
from medusa.errors import MedusaError, RankLost, one_line
from medusa.model import MedusaModel
from medusa.runs.console import note

LOADING = timedelta(hours=2)  # how long ranks wait for each other while they load
GRACE = 2.0  # seconds in which rank 0 may report by itself why another has ended


def load_model(model: str, tp: int = 1, **options: Any) -> MedusaModel:
    """The Medusa model of these names, in `tp` parts of which this process holds the first and leads the others.

    Args:
        options: those of `named.load_model`.

    Raises:
        MedusaError: as there, and if the model cannot be parted so.
    """
    if tp == 1:
        return named.load_model(model, **options)
    named.require_parts(model, tp, options)
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, tp, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(1, tp):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_follow, args=(rank, tp, store.port, theirs, model, options), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        pipes.append(ours)
        processes.append(process)
    ending = threading.Event()
    atexit.register(ending.set)  # before multiprocessing ends the other ranks
    threading.Thread(target=_watch, args=(pipes, processes, ending), daemon=True).start()
    _join(store, 0, tp)
    medusa = named.load_model(model, tp=tp, **options)
    assert medusa.ranks is not None
    medusa.ranks.leading = True
    return medusa


def _join(store: dist.TCPStore, rank: int, size: int) -> None:
    """Make this process a rank of the group."""
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    os.environ["LOCAL_RANK"] = str(rank)  # transformers and we choose the GPU by it
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=LOADING, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LOADING)


def _follow(rank: int, size: int, port: int, pipe: Connection, model: str, options: dict[str, Any]) -> None:
    """What another rank does: it loads its part, and repeats the calls of rank 0 until that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which may only end an answer
    threading.Thread(target=_end_with_rank_0, args=(rank,), daemon=True).start()
    warnings.simplefilter("ignore")  # rank 0 gives them
    try:
        _join(dist.TCPStore("127.0.0.1", port, size, is_master=False), rank, size)
        medusa = named.load_model(model, tp=size, **options)
        assert medusa.ranks is not None
        medusa.ranks.follow()
    except Exception as error:  # of any kind: this process has no caller
        if isinstance(error, RankLost):
            time.sleep(GRACE / 4)  # if it is rank 0 that has ended, `_end_with_rank_0` says so
        pipe.send(str(error) if isinstance(error, MedusaError) else f"{type(error).__name__}: {one_line(error)}")
    os._exit(1)


def _end_with_rank_0(rank: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if rank == 1:
        note("medusa: rank 0 has ended, so the other ranks end too")
    os._exit(1)


def _watch(pipes: list[Connection], processes: list[Any], ending: threading.Event) -> None:
    """End this process with one line when another rank ends: without its part of the model nothing can be computed."""
    ended = wait(pipes)
    rank, pipe = next((rank, pipe) for rank, pipe in enumerate(pipes, 1) if pipe in ended)
    try:
        reason = pipe.recv()
    except EOFError:
        processes[rank - 1].join(GRACE)
        reason = f"exit code {processes[rank - 1].exitcode}"
    time.sleep(GRACE)
    if ending.is_set():
        return
    note(f"medusa: rank {rank} of {len(pipes) + 1} has ended, and the others with it: {reason}")
    for process in processes:
        process.kill()
    os._exit(1)

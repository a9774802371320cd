"""Processes of a gloo group that run the functions of ``jobs.py``."""

import datetime
import io
import queue
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60


class Ranks:
    """``size`` processes that stay up from job to job.

    Args:
        size: number of ranks.
    """

    def __init__(self, size):
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.jobs = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, jobs, self.results), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, job, *args):
        """Results of ``job(*args)``, by rank.

        Raises:
            AssertionError: with the traceback of a rank that failed, or when the ranks take too long.
        """
        for jobs in self.jobs:
            jobs.put((job, args))
        found, errors = {}, []
        try:
            while len(found) < len(self.jobs):
                rank, saved, error = self.results.get(timeout=SECONDS)
                found[rank] = torch.load(io.BytesIO(saved), weights_only=True)
                errors += [error] if error else []
        except queue.Empty:
            self.close()
            raise AssertionError(f"only ranks {sorted(found)} finished in {SECONDS} s") from None
        assert not errors, errors[0]
        return [found[rank] for rank in range(len(self.jobs))]

    def close(self):
        """End the processes."""
        for process, jobs in zip(self.processes, self.jobs, strict=True):
            jobs.put(None)
            process.join(5)
            process.kill()


def _serve(rank, size, port, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    for job, args in iter(jobs.get, None):
        saved, error, result = io.BytesIO(), "", None
        try:
            result = job(*args)
        except Exception:
            error = traceback.format_exc()
        torch.save(result, saved)
        results.put((rank, saved.getvalue(), error))
    dist.destroy_process_group()

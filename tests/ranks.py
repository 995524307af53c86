"""Processes that run the same function side by side, as the ranks of torch.distributed do."""

import datetime
import multiprocessing
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist

WORLD = 3
SECONDS = 60  # for one job on all ranks: a hang fails here; most jobs take milliseconds


class Ranks:
    """Processes in one gloo group; calling it runs a job(rank, *args) on each of them."""

    def __init__(self, store, world=WORLD):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the death of the process ends the pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, job, *args):
        """What each rank returned, or the exception it raised, or None if it died."""
        until = time.monotonic() + SECONDS
        for pipe in self.pipes:
            pipe.send((job, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(until - time.monotonic(), 0)):
                self.stop()
                pytest.fail(f"{job.__name__}: rank {rank} has not answered in {SECONDS} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(None)
        return answers

    def values(self, job, *args):
        """What each rank returned; an exception on one is raised here."""
        answers = self(job, *args)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:  # the tests are over
            os._exit(0)
        try:
            answer = job(rank, *args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)

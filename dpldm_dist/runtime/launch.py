"""Start the workers of a run, wait for them, and raise the root cause when one fails."""

from __future__ import annotations

from collections.abc import Sequence

from dpldm_dist.config import RunConfig
from dpldm_dist.runtime.failures import explain
from dpldm_dist.runtime.jobs import Job, do_jobs, job_order, run_dirs
from dpldm_dist.runtime.worker import set_threads, solo_worker, worker_device

__all__ = ["Job", "launch"]


def launch(jobs: Sequence[Job], *, run: RunConfig) -> None:
    """Run ``jobs`` one after another on ``run.workers`` workers started by ``run.launcher``.

    All jobs share one start of the workers. Nothing is returned: stages leave manifests on disk.
    One local worker is this process. New files are private to the user (umask 077); at the end
    ``public/`` and ``release/`` get the user's own permissions.

    Raises: the DpldmError of the worker that failed first, as its own class; WorkerError for a
    worker that died; DpldmError naming the file of the traceback for anything else.
    """
    if not jobs:
        return
    if run.launcher == "local":
        run = run.model_copy(update={"workers": run.most_workers})
    try:
        if run.launcher == "ray":
            from dpldm_dist.runtime.launch_ray import launch_ray  # ray only where it is used

            launch_ray(job_order(jobs, run=run), run=run)
        elif run.workers > 1:
            from dpldm_dist.runtime.launch_local import launch_local

            launch_local(job_order(jobs, run=run), run=run)
        else:
            _launch_here(jobs, run=run)
    finally:
        for directory in run_dirs(jobs):
            directory.share()


def _launch_here(jobs: Sequence[Job], *, run: RunConfig) -> None:
    set_threads(run, workers_here=1)
    worker = solo_worker(worker_device(run))
    order = job_order(jobs, run=run)
    try:
        do_jobs(order, worker)
    except Exception as error:
        explained = explain(error, rank=0, run_dir=run.dir)
        if explained is error:
            raise
        raise explained from error

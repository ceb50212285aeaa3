"""``dpldm submit STAGE``: run a stage on a Ray cluster, from a machine that is not part of it."""

from __future__ import annotations

from dpldm_dist.config import Config
from dpldm_dist.runtime.submit_ray import submission
from dpldm_dist.runtime.submit_ray import submit as send
from dpldm_dist.runtime.worker import Worker


def submit(config: Config, worker: Worker, *, what: str) -> None:
    """Send the stage ``what`` to the cluster at ``run.ray_api_address``, and end as it ends.

    To resume a job that stopped or failed, submit it again. Raises: see submit_ray.submit.
    """
    job = submission(config, what)
    send(job, stage=what, wait=config.run.submit_wait, patience_s=config.run.nodes_wait_s)


def describe(config: Config, *, what: str) -> list[str]:
    """What ``submit`` would send, for --dry-run."""
    job = submission(config, what)
    return [
        f"to      {job.address}",
        f"runs    {job.command}",
        *(f"with    {name}={value}" for name, value in job.environment.items()),
    ]

"""A driver in a process of its own, for tests that kill it: python driver_for_tests.py FOLDER."""

import signal
import sys

import stages_for_tests as stages

from dpldm_dist.config import parse_config
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir

if __name__ == "__main__":
    # a test that runs in the background of a shell inherits that SIGINT is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = sys.argv[1]
    RunDir(folder).create()
    config = parse_config({"run": {"dir": folder, "workers": 2, "device": "cpu"}})
    launch([Job(stages.wait_forever, config)], run=config.run)

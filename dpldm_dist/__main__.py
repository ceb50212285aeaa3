"""``python -m dpldm_dist`` is ``dpldm``."""

from dpldm_dist.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

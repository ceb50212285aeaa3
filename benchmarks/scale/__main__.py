"""``python -m benchmarks.scale``: measure, fit, hold against further runs, rewrite docs/scaling.md.

As root, on a machine that has nothing else to do: about a quarter of an hour on two cores.
``--parts`` does some of it and keeps the rest of the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import data, encoding, frozen, page
from benchmarks.scale.fit import FIT, HELD_OUT, SETTINGS, errors, fit, shares_of_link
from benchmarks.scale.measure import Measured, Setting, as_json, from_json, measure
from benchmarks.scale.tiny import make_inputs

RESULTS = Path(__file__).parent / "results" / "scale.json"
WITHIN = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parts = ("data", "encode", "frozen", "steps", "page")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to do")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each setting; the best counts"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the machine has other work; free links are then timed by use of processors",
    )
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "data" in options.parts:
        results["data"] = data.simulate()
        _keep(results)
    if "encode" in options.parts:
        results["encode"] = encoding.throughput()
        _keep(results)
    if "frozen" in options.parts:
        results["frozen"] = frozen.divided()
        _keep(results)
    if "steps" in options.parts:
        results |= _steps(options.repeats, options.clock)
        _keep(results)
    results |= _fitted(results)
    _keep(results)
    page.rewrite(results)
    return _verdict(results)


def _steps(repeats: int, clock: str) -> dict[str, Any]:
    cores, machine = len(os.sched_getaffinity(0)), {**_machine(), "clock": clock}
    with tempfile.TemporaryDirectory(prefix="dpldm-scale-") as folder:
        make_inputs(Path(folder))
        best: dict[Setting, Measured] = {}
        for number in range(repeats):
            for setting in SETTINGS:
                found = measure(
                    *(Path(folder), setting),
                    **{"number": number, "cores": cores, "clock": clock, "alone": setting in FIT},
                )
                print(f"{setting.name}: {found.step_s:.3f} s per step", flush=True)
                if setting not in best or found.step_s < best[setting].step_s:
                    best[setting] = found
    return {"machine": machine, "steps": [as_json(found) for found in best.values()]}


def _fitted(results: dict[str, Any]) -> dict[str, Any]:
    """What the model says of the runs that were measured."""
    found = {run.setting: run for run in map(from_json, results["steps"])}
    rates, shares = fit(found, cores=results["machine"]["cores"]), shares_of_link(found)
    runs = [found[setting] for setting in HELD_OUT]
    return {"rates": asdict(rates), "errors": errors(runs, rates, shares)}


def _verdict(results: dict[str, Any]) -> int:
    """0 if every run that was held out lies within 15 % of its prediction."""
    found = results.get("errors", {})
    for name, error in found.items():
        print(f"held out {name}: predicted {error:+.1%} off")
    return int(any(abs(error) > WITHIN for error in found.values()))


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else "an unnamed processor",
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "when": datetime.date.today().isoformat(),
    }


def _keep(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())

"""Check compaction on models of other packages and write docs/zoo.md.

Usage:
    python -m benchmarks.zoo [--only TEXT ...] [--again | --retry] [--stub] [--limit SECONDS]
    python -m benchmarks.zoo --render

Every case runs in a separate process and writes one JSON file to the results folder. A case with a record is skipped.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from benchmarks.zoo import models, table

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "zoo"


def record_of(case, folder):
    """Return the file of a case's record."""
    return folder / (re.sub(r"[^\w.-]+", "_", case.name) + ".json")


def failed(record):
    """Return whether a record has an error, lacks a part, or has outputs that are not equal."""
    return (
        record.get("stub", False) or not record.get("done") or any(table.problem(record, p) for p in record["patterns"])
    )


def wanted(case, folder, arguments):
    """Return whether a case is to be run."""
    if arguments.only and not any(text.lower() in case.name.lower() for text in arguments.only):
        return False
    path = record_of(case, folder)
    if arguments.again or not path.exists():
        return True
    return arguments.retry and failed(json.loads(path.read_text()))


def run(case, folder, arguments):
    """Run one case in a separate process; return its record."""
    path = record_of(case, folder)
    limit = arguments.limit * (3 if case.big else 1)
    command = [sys.executable, "-m", "benchmarks.zoo.check", case.name, str(path)]
    command += ["--stub"] * arguments.stub
    path.unlink(missing_ok=True)
    with open(path.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            end = "" if code == 0 else f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"the time limit of {limit} s"
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            path.unlink(missing_ok=True)
            raise
    record = json.loads(path.read_text()) if path.exists() else {"case": case.name, "patterns": {}}
    record |= {"package": case.package, "model": case.model, "stub": arguments.stub, "time": time.time()}
    if end:
        record["error"] = record.get("error", end)
    path.write_text(json.dumps(record) + "\n")
    return record


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="run cases whose package:model contains one of these")
    parser.add_argument("--again", action="store_true", help="run cases that have a record, too")
    parser.add_argument("--retry", action="store_true", help="run cases whose record has a failure, too")
    parser.add_argument("--stub", action="store_true", help="test this harness: remove nothing")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a case; three times that for a big one")
    parser.add_argument("--small", action="store_true", help="leave the big cases out")
    parser.add_argument("--stop", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--render", action="store_true", help="only write docs/zoo.md from the records")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    cases = [case for case in models.cases() if not (arguments.small and case.big)]
    todo = [] if arguments.render else [case for case in cases if wanted(case, arguments.results, arguments)]
    begin = time.monotonic()
    for done, case in enumerate(todo):
        passed = time.monotonic() - begin
        if passed > arguments.stop:
            print(f"stopped with {len(todo) - done} cases left", flush=True)
            break
        rate = f"{passed / done:.0f} s a case, {passed / done * (len(todo) - done) / 60:.0f} min left" if done else ""
        record = run(case, arguments.results, arguments)
        outcome = table.outcome(record)
        print(f"{done + 1}/{len(todo)} {case.name}: {outcome} ({record.get('wall', 0):.0f} s) {rate}", flush=True)
    if not arguments.stub:
        table.write(cases, [record_of(case, arguments.results) for case in cases])


if __name__ == "__main__":
    main()

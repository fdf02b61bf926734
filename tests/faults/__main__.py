"""Strikes runs of bin/train by seeded faults, and writes docs/faults.md.

The exit code is 1 where a run neither went on nor could be retried to the same bits. Such runs are
printed with their numbers, and keep their directories; `--only NUMBER` plays one again.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.bin.runs import ROOT
from tests.faults.cases import make_case
from tests.faults.play import Outcome, describe, play
from tests.faults.table import page
from tests.faults.truth import World


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=320, help="how many (320)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this one alone; no page")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="omnistep-faults-"))
    world = World.make(directory)
    outcomes: list[Outcome] = []
    try:
        for number in range(args.runs) if args.only is None else [args.only]:
            outcomes.append(play(world, make_case(world, args.seed, number)))
            print(line(outcomes[-1]), flush=True)
    finally:
        world.close()
    failed = [outcome for outcome in outcomes if outcome.verdict == "failed"]
    if args.only is None:
        text = page(outcomes, args.runs, args.seed)
        (ROOT / "docs/faults.md").write_text(text, encoding="utf-8")
    for outcome in failed:
        print(f"failed: python -m tests.faults --seed {args.seed} --only {outcome.case.number}")
    if failed:
        print(f"their directories: {directory}/runs")
    else:
        shutil.rmtree(directory)
    return int(bool(failed))


def line(outcome: Outcome) -> str:
    drawn = f"{outcome.case.number} {outcome.verdict} ({outcome.seconds:.1f} s): "
    problems = "".join(f"\n    - {problem}" for problem in outcome.problems)
    return f"{drawn}{describe(outcome.case)}\n    {outcome.how}{problems}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

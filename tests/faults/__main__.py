"""`python -m tests.faults [--runs 240] [--seed 0]`: strikes that many runs of bin/train, and writes
docs/faults.md. `--only N` plays one of them again, alone, and keeps its directory."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.cases import make_case
from tests.faults.play import describe, play
from tests.faults.truth import World


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="omnistep-faults-"))
    world = World.make(directory)
    outcomes = []
    try:
        for number in args.only if args.only is not None else range(args.runs):
            case = make_case(world, args.seed, number)
            outcome = play(world, case)
            outcomes.append(outcome)
            if outcome.problems or args.verbose or args.only:
                print(
                    f"{number}: {describe(case)}\n    {outcome.verdict}: {outcome.how}  [{outcome.seconds:.1f} s]"
                )
                for p in outcome.problems:
                    print("    -", p)
                sys.stdout.flush()
    finally:
        world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

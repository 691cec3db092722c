"""Lets the trainer and the layers run for long: python -m tests.soak [--minutes M] [trainer] [layers].

trainer: runs that are stopped, killed, moved and left without disk space at random, under a memory limit, end bit for
bit as those that nothing befell. layers: calls from several threads give the bits that one thread alone gets. Each part
takes the minutes; in both, memory does not grow. Prints figures; the exit code is 1 where anything was wrong.
"""

import argparse
import sys
import time

from . import layers, trainer

PARTS = {"trainer": trainer.soak, "layers": layers.soak}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="trainer, layers (both)")
    parser.add_argument("--minutes", type=float, default=60, help="of each part (60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is random (the time)")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"PART: got {part}, expected {' or '.join(PARTS)}")
    faults = []
    for part in arguments.parts or PARTS:
        print(f"{part}, {arguments.minutes:g} minutes, --seed {arguments.seed}", flush=True)
        figures, found = PARTS[part](arguments.minutes * 60, arguments.seed)
        for name, value in figures.items():
            print(f"  {name:<32}{value:>12}", flush=True)
        for fault in found:
            print(f"  WRONG: {fault}", flush=True)
        faults += found
    print("nothing was wrong" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

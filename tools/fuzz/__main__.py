"""Damaged input: ``python tools/fuzz [KIND...] [--count N] [--seed S]``.

Kinds are data, recipes, state and models.

Whole files are changed a little, and read: an error of ours is the right answer, and
so is none. Anything else is printed with the seed that makes it again, and so is what
takes longer than ten seconds or a gigabyte. The exit code is then 1.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from onnxshrink.errors import OnnxshrinkError
from tools.fuzz.targets import TARGETS, Target, changed

SECONDS = 10
"""Processor seconds that one input may take."""
GROWTH = 1 << 30
"""Bytes that the process may grow by while it reads one input."""


class TooLongError(BaseException):
    """An input took too long; no code under test may swallow that."""


@dataclass
class Found:
    """What came of a kind of input.

    Attributes:
        answers: How often each kind of answer came.
        failures: What must not be, with the seed that makes it again.
    """

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(name: str, count: int, seed: int, folder: Path) -> Found:
    """Read changed files of a kind.

    Args:
        name: The kind.
        count: Inputs.
        seed: Seed of all; input ``n`` has a generator of (seed, n).
        folder: Where files lie.
    """
    target: Target = TARGETS[name](folder)
    found = Found()

    def late(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        for number in range(count):
            random = np.random.default_rng((seed, number))
            path, data = target.whole[int(random.integers(len(target.whole)))]
            path.write_bytes(changed(data, random, target.words))
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                target.read(path)
                answer = "read"
            except OnnxshrinkError as error:
                answer = type(error).__name__
                if not str(error):
                    found.failures.append(f"{name} {seed} {number}: no words")
            except TooLongError:
                answer = "took too long"
                found.failures.append(f"{name} {seed} {number}: {answer}")
            except BaseException as error:
                answer = type(error).__name__
                where = traceback.extract_tb(error.__traceback__)[-1]
                found.failures.append(
                    f"{name} {seed} {number}: {answer} {error} in {where.filename}:"
                    f"{where.lineno}"
                )
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            found.answers[answer] += 1
    finally:
        signal.signal(signal.SIGVTALRM, before)
    return found


def _limit() -> None:
    """Bound the address space, so that greed is a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * GROWTH, -1))


def main() -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(TARGETS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name in asked.kinds:
        if name not in TARGETS:
            parser.error(f"no kind {name!r}; there are {', '.join(TARGETS)}")
    bad = 0
    for name in asked.kinds:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            if name != "models":  # onnxruntime reserves more than it uses
                _limit()
            found = fuzz(name, asked.count, asked.seed, Path(folder))
        seconds = time.process_time() - start
        words = ", ".join(f"{n} {answer}" for answer, n in found.answers.most_common())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{name}: {words}; {seconds:.0f} s, peak {peak} MB")
        for line in found.failures[:20]:
            print(f"  {line}")
        bad += len(found.failures)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())

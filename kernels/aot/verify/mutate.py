"""Break compiled kernels in one place and see what notices: `python -m beit_fast.kernels.aot.verify.mutate 80`."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..compile import require_compiler
from ..executor.errors import KernelError, UnsupportedInstructionError
from ..executor.schedule import Schedule
from .cases import Case, LinearCase, NormCase
from .check import Run, error_of, run
from .mutations import Mutant, mutants, spread
from .operators import Prepared, prepare
from .table import attention_case, layouts

NOTED = "noted, same bits"
"""The executor notes what PTX forbids and ptxas mends."""
SAME_BITS, OTHER_BITS = "survived, same bits", "survived, other bits"


WORSE = 1.5
"""Factor of an error that is a change of the results: other orders of sums change it by less than a tenth."""


class Subject(NamedTuple):
    """A kernel, and the case in which it is broken."""

    kernel: str  # entry point
    case: Case


class Verdict(NamedTuple):
    """What the check says of a mutant."""

    kernel: str
    mutant: Mutant
    text: str  # the kind of fault, "wrong numbers", SAME_BITS or OTHER_BITS

    @property
    def survived(self) -> bool:
        return self.text in (SAME_BITS, OTHER_BITS)


KERNELS = (
    *("attention_forward", "backward_dkv", "backward_dq", "backward_dbias"),
    *("linear_gelu", "residual_norm_backward"),
)
"""Kernels that are broken, in bf16 and with a bias."""


def subject_of(kernel: str, capability: int) -> Subject:
    """Return the kernel with the case in which it is broken."""
    if kernel == "linear_gelu":
        case: Case = LinearCase(capability, "bf16", 70, 208, 176)
    elif kernel == "residual_norm_backward":
        case = NormCase(capability, "bf16", "bf16", 768)
    else:
        case = attention_case(capability, "bf16", 64, layouts(capability, "bf16")[0])
        case = case._replace(backward=kernel != "attention_forward")
    return Subject(f"{kernel}_kernel", case)


def judge(subject: Subject, limit: int, kind: str = "", schedule: Schedule = Schedule()) -> Iterator[Verdict]:  # noqa: B008
    """Yield the verdict on at most `limit` mutants of each kind."""
    prepared = prepare(subject.case)
    original: list[str] = []

    def remember(ptx: str) -> str:
        if re.search(rf"\.entry \w*{subject.kernel}\w*\(", ptx):  # nvcc's names have more around it
            original.append(ptx)
        return ptx

    right = run(subject.case, prepared, schedule, remember)
    assert _text(subject.case, prepared, right, right) == SAME_BITS, f"{subject.kernel} is wrong without a mutation"
    found = [mutant for mutant in mutants(original[0]) if kind in mutant.kind]
    for mutant in spread(found, limit):
        yield Verdict(subject.kernel, mutant, _verdict(subject.case, prepared, schedule, original[0], mutant, right))


def _verdict(case: Case, prepared: Prepared, schedule: Schedule, original: str, mutant: Mutant, right: Run) -> str:
    try:
        broken = run(case, prepared, schedule, lambda ptx: mutant.ptx if ptx == original else ptx)
    except (KernelError, UnsupportedInstructionError) as error:
        return type(error).__name__
    return _text(case, prepared, broken, right)


def _text(case: Case, prepared: Prepared, done: Run, right: Run) -> str:
    """Return how the results differ from the right ones."""
    hazards = [hazard.kind for launch in done.launches for hazard in launch.hazards]
    if hazards:
        return hazards[0]
    if any(launch.rewritten for launch in done.launches):
        return "rewritten"
    errors = {name: error_of(done.results[name], exact) for name, exact in prepared.exact.items()}
    if any(not error <= prepared.budgets[name] for name, error in errors.items()):
        return "wrong numbers"
    if all(torch.equal(done.results[name], right.results[name]) for name in errors):
        return NOTED if _notes(done) - _notes(right) else SAME_BITS
    # The budget of 16 bits is wide; the committed results hold the error itself.
    usual = {name: error_of(right.results[name], exact) for name, exact in prepared.exact.items()}
    return "larger error" if any(error > WORSE * usual[name] for name, error in errors.items()) else OTHER_BITS


def _notes(done: Run) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for launch in done.launches:
        for note, count in launch.notes.items():
            counts[note.kernel, note.problem] += count
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is caught and what survives, by kind."""
    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot.verify.mutate", description=__doc__)
    parser.add_argument("capabilities", nargs="+", type=int, help="such as 80 90")
    parser.add_argument("--limit", type=int, default=6, help="mutants of each kind and kernel")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this text")
    parser.add_argument("--kind", default="", help="kinds of mutants whose name contains this text")
    options = parser.parse_args(argv)
    require_compiler()
    counts: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    survivors = []
    for capability, subject in itertools.product(options.capabilities, KERNELS):
        if options.kernel not in subject:
            continue
        verdicts = judge(subject_of(subject, capability), options.limit, options.kind)
        for verdict in tqdm(verdicts, f"sm_{capability} {subject}"):
            counts[capability, verdict.mutant.kind][verdict.text] += 1
            if verdict.survived:
                survivors.append((capability, verdict))
    for (capability, kind), texts in counts.items():
        survived = texts[SAME_BITS] + texts[OTHER_BITS]
        details = ", ".join(f"{text} {count}" for text, count in texts.most_common())
        print(f"sm_{capability} {kind}: caught {texts.total() - survived} of {texts.total()} ({details})")
    for capability, (kernel, mutant, text) in survivors:
        print(f"sm_{capability} {kernel}, line {mutant.line}, {mutant.kind}: {text}: {mutant.statement}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Break compiled kernels in one place and see what notices: `python -m beit_fast.kernels.aot.verify.mutate 80`."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
from tqdm import tqdm

from ..compile import capabilities_error, require_compiler
from ..executor.errors import KernelError, UnsupportedInstructionError
from ..executor.kernel_code import load
from ..executor.schedule import Schedule
from ..nvcc import MISSING, nvcc_version
from . import check
from .cases import Case, LinearCase, NormCase
from .check import Run, error_of, run
from .mutations import MUTATIONS, ORDER, Limits, Mutant, mutants, spread
from .operators import Prepared, prepare
from .patch_table import PATCH_CAPABILITIES, patch_cases
from .replay import Done, replayed
from .table import attention_case, layouts

CAUGHT, NOTED, SURVIVED = "caught", "noted", "survived"
"""Outcomes. Noted: the bits are the same, and the executor notes what PTX forbids and ptxas mends."""
SAME_BITS, OTHER_BITS = "survived, same bits", "survived, other bits"

WINDOW = 15, 20
"""With two steps, as in 12x14, a pipelined loop of sm_100 has all its products outside the loop."""

SCHEDULES = check.SCHEDULES[:2]
"""What warps in step do not show of the kinds of `ORDER` may show in another order."""

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
    text: str  # the kind of fault, "wrong numbers", NOTED, SAME_BITS or OTHER_BITS

    @property
    def outcome(self) -> str:
        return _outcome(self.text)


def _outcome(text: str) -> str:
    return {NOTED: NOTED, SAME_BITS: SURVIVED, OTHER_BITS: SURVIVED}.get(text, CAUGHT)


KERNELS = (
    *("attention_forward", "backward_dkv", "backward_dq", "backward_dbias"),
    *("linear_gelu", "residual_norm_backward", "patch_embed"),
)
"""Kernels that are broken, in bf16 and with a bias."""


def kernels_of(capability: int) -> tuple[str, ...]:
    """Return the kernels that are broken on an architecture. The last one needs nvcc."""
    return KERNELS if capability in PATCH_CAPABILITIES and nvcc_version() is not None else KERNELS[:-1]


def subject_of(kernel: str, capability: int) -> Subject:
    """Return the kernel with the case in which it is broken."""
    if kernel == "linear_gelu":
        case: Case = LinearCase(capability, "bf16", 70, 208, 176)
    elif kernel == "residual_norm_backward":
        case = NormCase(capability, "bf16", "bf16", 768)
    elif kernel == "patch_embed":
        case = next(case for case in patch_cases(capability) if case.dtype == "bf16")
    else:
        case = attention_case(capability, "bf16", 64, layouts(capability, "bf16")[0])
        case = case._replace(window=WINDOW, backward=kernel != "attention_forward")
    return Subject(f"{kernel}_kernel", case)


def judge(
    subject: Subject,
    limits: Limits = Limits(),  # noqa: B008
    kind: str = "",
    done: Done | None = None,
) -> Iterator[Verdict]:
    """Yield verdicts on some mutants of each kind whose name contains `kind`. `done` keeps the other kernels."""
    prepared = prepare(subject.case)
    original: list[str] = []

    def remember(ptx: str) -> str:
        if _is_of(subject, ptx):
            original.append(ptx)
        return ptx

    with replayed(lambda ptx: _is_of(subject, ptx), {} if done is None else done):
        right = {schedule: run(subject.case, prepared, schedule, remember) for schedule in SCHEDULES}
        for result in right.values():  # another order has other notes
            text = _text(prepared, result, right[SCHEDULES[0]])
            assert text in (SAME_BITS, NOTED), f"{subject.kernel} is wrong without a mutation: {text}"
        found = [mutant for mutant in mutants(original[0]) if kind in mutant.kind]
        for mutant in spread(found, limits):
            yield Verdict(subject.kernel, mutant, _verdict(subject.case, prepared, original[0], mutant, right))
            load.cache_clear()  # each mutant is a module of its own


def _is_of(subject: Subject, ptx: str) -> bool:
    return re.search(rf"\.entry \w*{subject.kernel}\w*\(", ptx) is not None  # nvcc's names have more around it


def _verdict(case: Case, prepared: Prepared, original: str, mutant: Mutant, right: Mapping[Schedule, Run]) -> str:
    """Return what is seen of the mutant. The first order of warps in which it is caught counts, or the last."""
    texts = []
    for schedule in SCHEDULES if mutant.kind in ORDER else SCHEDULES[:1]:
        try:
            broken = run(case, prepared, schedule, lambda ptx: mutant.ptx if ptx == original else ptx)
        except (KernelError, UnsupportedInstructionError) as error:
            return type(error).__name__
        texts.append(_text(prepared, broken, right[schedule]))
        if _outcome(texts[-1]) == CAUGHT:
            break
    return NOTED if NOTED in texts and texts[-1] == SAME_BITS else texts[-1]


def _text(prepared: Prepared, done: Run, right: Run) -> str:
    """Return how the results differ from the right ones."""
    hazards = [hazard.kind for launch in done.launches for hazard in launch.hazards]
    if hazards:
        return hazards[0]
    reference = prepared.reference()
    errors = {name: error_of(done.results[name], exact) for name, exact in reference.exact.items()}
    if any(not error <= reference.budgets[name] for name, error in errors.items()):
        return "wrong numbers"
    if all(torch.equal(done.results[name], right.results[name]) for name in errors):
        return NOTED if _notes(done) - _notes(right) else SAME_BITS
    # The budget of 16 bits is wide; the committed results hold the error itself.
    usual = {name: error_of(right.results[name], exact) for name, exact in reference.exact.items()}
    return "larger error" if any(error > WORSE * usual[name] for name, error in errors.items()) else OTHER_BITS


def _notes(done: Run) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for launch in done.launches:
        for note, count in launch.notes.items():
            counts[note.kernel, note.problem] += count
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of what is caught, noted and not seen.

    The table is by kind. The places of the mutants that are not caught follow.
    """
    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot.verify.mutate", description=__doc__)
    parser.add_argument("capabilities", nargs="+", type=int, help="such as 80 90")
    parser.add_argument("--limit", type=int, default=Limits().other, help="mutants of each kind and kernel")
    parser.add_argument("--order-limit", type=int, help="the same for dropped barriers, waits and fences (default all)")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this text")
    parser.add_argument("--kind", default="", help="kinds of mutants whose name contains this text")
    options = parser.parse_args(argv)
    if error := capabilities_error(options.capabilities):
        parser.error(error)
    kernels = [kernel for kernel in KERNELS if options.kernel in kernel]
    if not kernels:
        parser.error(f"no kernel contains {options.kernel!r} (expected one of {', '.join(KERNELS)})")
    if not any(options.kind in kind for kind in MUTATIONS):
        parser.error(f"no kind contains {options.kind!r} (expected one of {', '.join(MUTATIONS)})")
    require_compiler()
    if "patch_embed" in kernels and nvcc_version() is None:
        print(f"{MISSING}: patch_embed is not broken")
    limits = Limits(options.order_limit, options.limit)
    for capability in options.capabilities:
        verdicts: list[Verdict] = []
        done: Done = {}
        for kernel in (kernel for kernel in kernels if kernel in kernels_of(capability)):
            found = judge(subject_of(kernel, capability), limits, options.kind, done)
            verdicts += tqdm(found, f"sm_{capability} {kernel}", disable=None)
        print("\n".join(_report(capability, verdicts)))
    return 0


def _report(capability: int, verdicts: Sequence[Verdict]) -> Iterator[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        counts[verdict.mutant.kind][verdict.text] += 1
    yield f"sm_{capability}, Triton {triton.__version__}\n"
    yield f"| kind | mutants | {CAUGHT} | {NOTED} | {SURVIVED} | caught by |\n|---|---|---|---|---|---|"
    for kind, texts in counts.items():
        yield _row(kind, texts)
    yield _row("all", Counter(verdict.text for verdict in verdicts))
    yield ""
    for verdict in verdicts:
        kernel, mutant, text = verdict
        if verdict.outcome != CAUGHT:
            yield f"sm_{capability} {kernel}, line {mutant.line}, {mutant.kind}: {text}: {mutant.statement}"


def _row(kind: str, texts: Counter[str]) -> str:
    outcomes: Counter[str] = Counter()
    for text, count in texts.items():
        outcomes[_outcome(text)] += count
    by = ", ".join(f"{text} {count}" for text, count in texts.most_common() if _outcome(text) == CAUGHT)
    cells = [texts.total(), *(outcomes[outcome] for outcome in (CAUGHT, NOTED, SURVIVED)), by]
    return f"| {kind} | " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())

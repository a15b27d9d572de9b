"""Forms of instructions that are implemented: order of modifiers and number of operands."""

from __future__ import annotations

import functools
import re

from ..ptx import Instruction

_INTEGER = "[us](?:16|32|64)"
_BITS = "b(?:16|32|64)"
_DATA = r"(?:v[24]\.)?(?:[bus](?:8|16|32|64)|f32|f64)"
_HALF = "b?f16(?:x2)?"
_MATRIX = r"sync\.aligned\.m8n8\.x[124](?:\.trans)?\.shared\.b16"
_BARRIER = r"(?:cta\.)?sync(?:\.aligned)?"
_CTA = r"cta_group_1\.sync\.aligned"
_SUM = rf"(?:rn\.)?(?:(?:ftz\.)?(?:sat\.)?f32|f64|(?:ftz\.)?f32x2|{_HALF})"
_MIXED = r"f32\.b?f16"  # fp32 results of 16-bit factors
_EXTREME = rf"(?:ftz\.)?(?:NaN\.)?f32|f64|(?:NaN\.)?{_HALF}|{_INTEGER}"
_SIGN = rf"(?:ftz\.)?f32|f64|{_HALF}|s(?:16|32|64)"
_ROUNDED = r"(?:approx|rn)\.(?:ftz\.)?f32|rn\.f64"
_APPROXIMATE = r"approx\.(?:ftz\.)?f32"

# Conversions flush subnormal numbers (.ftz) only where the result is the same without it.
_WHOLE = "[us](?:8|16|32|64)"
_CONVERSION = (
    rf"{_WHOLE}\.{_WHOLE}|rn\.f(?:16|32|64)\.{_WHOLE}|r[nzmp]i\.{_WHOLE}\.f(?:16|32|64)|r[nz]i\.ftz\.{_WHOLE}\.f32"
    r"|r[nzmp]i\.(f(?:16|32|64))\.\1|f64\.f(?:16|32)|rn\.f32\.f64|(?:ftz\.)?f32\.f16|f32\.bf16"
    r"|rn\.(?:ftz\.)?f16(?:x2)?\.f32|rn\.bf16(?:x2)?\.f32|rna\.tf32\.f32"
)

_ANY: tuple[int, ...] = ()
"""Operands that the translation of the instruction counts."""

_FORMS: dict[str, dict[str, tuple[int, ...]]] = {
    "ld": {
        rf"(?:(?:volatile|weak)\.)?(?:global|shared|local|param)\.{_DATA}": (2,),
        rf"(?:weak\.)?global\.nc\.{_DATA}": (2,),
    },
    "st": {rf"(?:(?:volatile|weak)\.)?(?:global|shared|local)\.{_DATA}": (2,)},
    "mov": {rf"pred|{_INTEGER}|{_BITS}|f32|f64": (2,)},
    "cvta": {r"(?:to\.)?global\.u64": (2,)},
    "cp": {
        r"async\.(?:commit_group|wait_all)": (0,),
        r"async\.wait_group": (1,),
        r"async\.c[ag]\.shared\.global(?:\.L2_(?:64|128|256)B)?": (3, 4),
    },
    "fence": {r"proxy\.async(?:\.shared)?": (0,)},
    "mbarrier": {r"init\.shared\.b64": (2,), r"inval\.shared\.b64": (1,), r"try_wait\.parity\.shared\.b64": (3,)},
    "ldmatrix": {_MATRIX: (2,)},
    "stmatrix": {_MATRIX: (2,)},
    "mma": {r"sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(\w+)\.\1\.f32": (4,)},
    "wgmma": {
        r"(?:fence|commit_group)\.sync\.aligned": (0,),
        r"wait_group\.sync\.aligned": (1,),
        r"mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1": (7, 8),
        r"mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32": (6,),
    },
    "tcgen05": {
        rf"alloc\.{_CTA}\.shared\.b32": (2,),
        rf"dealloc\.{_CTA}\.b32": (2,),
        rf"relinquish_alloc_permit\.{_CTA}": (0,),
        r"wait_(?:ld|st)\.sync\.aligned": (0,),
        r"(?:ld|st)\.sync\.aligned\.32x32b\.x\d+\.b32": (2,),
        r"(?:ld|st)\.sync\.aligned\.16x32bx2\.x\d+\.b32": (3,),
        r"mma\.cta_group_1\.kind_(?:f16|tf32)": (5,),
        r"commit\.cta_group_1\.mbarrier_arrive_one(?:\.shared(?:_cluster)?)?\.b64": (1,),
    },
    "shfl": {r"sync\.(?:bfly|idx|up|down)\.b32": (5,)},
    "redux": {r"sync\.\w+(?:\.NaN)?\.\w+": (3,)},
    "vote": {r"sync\.(?:all|any)\.pred|sync\.ballot\.b32": (3,)},
    "elect": {"sync": (2,)},
    "bar": {_BARRIER: (1,), r"warp\.sync": (1,)},
    "barrier": {_BARRIER: (1,)},
    "bra": {"(?:uni)?": (1,)},
    "ret": {"(?:uni)?": (0,)},
    "exit": {"": (0,)},
    "setp": {rf"[a-z]+(?:\.(?:and|or|xor))?\.(?:{_INTEGER}|{_BITS}|(?:ftz\.)?f32|f64|b?f16)": (3, 4)},
    "selp": {rf"{_INTEGER}|{_BITS}|f32|f64": _ANY},
    "add": {rf"{_SUM}|(?:rn\.)?{_MIXED}|{_INTEGER}": _ANY},
    "sub": {rf"{_SUM}|(?:rn\.)?{_MIXED}|{_INTEGER}": _ANY},
    "mul": {rf"{_SUM}|(?:lo|hi|wide)\.{_INTEGER}": _ANY},
    "mad": {rf"(?:lo|hi|wide)\.{_INTEGER}": _ANY},
    "fma": {rf"rn\.(?:(?:ftz\.)?(?:sat\.)?f32|(?:ftz\.)?f32x2|{_HALF}|{_MIXED})": _ANY},
    "min": {_EXTREME: _ANY},
    "max": {_EXTREME: _ANY},
    "neg": {_SIGN: _ANY},
    "abs": {_SIGN: _ANY},
    "div": {rf"(?:approx|full|rn)\.(?:ftz\.)?f32|rn\.f64|{_INTEGER}": _ANY},
    "rem": {_INTEGER: _ANY},
    "sad": {_INTEGER: _ANY},
    "sqrt": {_ROUNDED: _ANY},
    "rcp": {_ROUNDED: _ANY},
    "rsqrt": {_APPROXIMATE: _ANY},
    "lg2": {_APPROXIMATE: _ANY},
    "ex2": {rf"{_APPROXIMATE}|approx\.{_HALF}": _ANY},
    "tanh": {rf"approx\.(?:f32|{_HALF})": _ANY},
    "and": {rf"pred|{_BITS}": _ANY},
    "or": {rf"pred|{_BITS}": _ANY},
    "xor": {rf"pred|{_BITS}": _ANY},
    "not": {rf"pred|{_BITS}": _ANY},
    "shl": {_BITS: _ANY},
    "shr": {rf"{_BITS}|{_INTEGER}": _ANY},
    "bfe": {"[us](?:32|64)": _ANY},
    "bfi": {"b(?:32|64)": _ANY},
    "shf": {r"[lr]\.(?:wrap|clamp)\.b32": _ANY},
    "prmt": {"b32": _ANY},
    "lop3": {"b32": _ANY},
    "popc": {"b(?:32|64)": _ANY},
    "clz": {"b(?:32|64)": _ANY},
    "brev": {"b(?:32|64)": _ANY},
    "cvt": {_CONVERSION: _ANY},
}
"""By opcode: a pattern of all modifiers, and the numbers of operands that it may have."""


@functools.lru_cache(maxsize=4096)
def _operand_counts(opcode: str, modifiers: str) -> tuple[int, ...] | None:
    """Return the numbers of operands; None if the form is not known."""
    forms = _FORMS.get(opcode, {})
    return next((counts for pattern, counts in forms.items() if re.fullmatch(pattern, modifiers)), None)


def check_form(instruction: Instruction) -> None:
    """Refuse modifiers that do not go together, and other numbers of operands.

    Raises:
        UnsupportedInstructionError: If the form is not implemented.
    """
    counts = _operand_counts(instruction.opcode, ".".join(instruction.modifiers))
    if counts is None:
        raise instruction.unsupported("these modifiers are not implemented together, or not in this order")
    if counts is not _ANY and len(instruction.operands) not in counts:
        raise instruction.unsupported(f"it has {len(instruction.operands)} operands")

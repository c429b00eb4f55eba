"""Types of the parameters of the family's kernels, for compiling them without tensors."""

from __future__ import annotations

from collections.abc import Mapping

from attnrewrite.kernels.generation.emit import Emitted

_FULL = {
    *("Lse", "Delta", "QueryTau", "ValueTau", "Sinks", "Slopes", "Strength"),
    *("Earlier", "Received", "Limit", "Later", "Parts", "PartLse"),
    *("DSelected", "DStrength", "DEarlier", "DQueryTau", "DValueTau", "DBias", "DSlopes"),
}
"""Parameters that are float32 whatever the inputs are."""
_NUMBERS = ("scale", "softcap", "kept", "largest")


def types(kernel: Emitted, dtype: str, mask: str = "u8") -> dict[str, str]:
    """Return the type of every parameter, for inputs of ``dtype`` ("bf16") and any length."""
    fixed = {"Mask": f"*{mask}", "Protected": "*u8", "Seed": "*i64", "Position": "*i64", "threshold": "i64"}
    fixed |= dict.fromkeys(("Death", "Live", "Lives"), "*i32")
    fixed |= {"Penalty": "*fp32" if dtype == "fp32" else "*fp16"}
    fixed |= dict.fromkeys(_FULL, "*fp32") | dict.fromkeys(_NUMBERS, "fp32")
    return {name: fixed.get(name) or _type(name, dtype) for name in kernel.parameters}


def constants(kernel: Emitted, blocks: Mapping[str, int]) -> dict[str, int]:
    """Return the values of constexpr parameters: blocks, and strides of features, which lie side by side."""
    ones = [name for name in kernel.parameters if name.startswith("stride_") and name.endswith("d")]
    return {**dict.fromkeys(ones, 1), **{name: size for name, size in blocks.items() if name in kernel.parameters}}


def _type(name: str, dtype: str) -> str:
    if name.startswith("stride_"):
        return "i32:16"
    return f"*{dtype}" if (name[0].isupper() and len(name) > 1) or name in "QKV" else "i32"

"""Small programs that show one site each without the model that it comes from.

The site's operators are written out as calls of torch, at the sizes they had. What enters gets random values; what
depends on no input, such as a mask made from positions, is written out, too.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.regions import is_mode_switch
from attnrewrite.passes.extract import Extract, of_anchor, of_site, onwards
from attnrewrite.passes.graph.nodes import NUMBER, is_weight, tensor
from attnrewrite.passes.matching.match import Found
from attnrewrite.passes.report import Report, Site

_TEMPLATE = '''"""{title}

{detail}

Layers: {layers}.
Made by `attnrewrite explain --repro`; it needs torch and attnrewrite, and no model.
"""

import torch

{imports}


class Case(torch.nn.Module):
    """The operators of the site, at the sizes that they had in the model."""

{weights}    def forward({arguments}):
{body}


def main():
    torch.manual_seed(0)
    inputs = [
{inputs}    ]
    report = {call}
    print(plain_text(report))


if __name__ == "__main__":
    main()
'''
_PLAIN = (
    "import attnrewrite\nfrom attnrewrite.render.text import plain_text",
    "attnrewrite.explain(Case().eval(), *inputs)",
)
_VARIANT = (
    "from attnrewrite.explanation import capture_model, explain_capture\n"
    "from attnrewrite.render.text import plain_text\n"
    "from attnrewrite.variants import VariantConfig"
)
_UNKNOWN = 8
"""The size of what had none when the graph was captured, because it depends on data."""


@dataclass
class _Case:
    """One program in the making: equal sites share it."""

    site: Site
    parts: dict[str, str]
    layers: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        code = self.site.rejections[0].code if self.site.rejections else self.site.status
        return re.sub(r"\W+", "_", f"{code}_{self.site.layer or 'top'}").strip("_") + ".py"

    def text(self) -> str:
        reasons = [f"{r.code} {r.title}: {r.detail}" for r in self.site.rejections] or ["It is matched."]
        title = f"{self.site.layer or 'The top level'} ({self.site.source or 'source not known'}): {self.site.status}."
        layers = ", ".join(layer or "the top level" for layer in self.layers)
        texts = {"title": title, "detail": "\n".join(reasons), "layers": layers}
        safe = {name: text.replace("\\", "/").replace('"""', "'''") for name, text in texts.items()}
        return _TEMPLATE.format(**safe, **self.parts)


def programs(report: Report, found: Found) -> dict[str, str]:
    """Return a program for every distinct rejected site, or where none is, for every distinct one: name -> text.

    ``report`` and ``found`` are of one ``inspect_capture``.
    """
    extracts = [*map(of_site, found.attentions), *(of_anchor(anchor) for anchor, _ in found.refused)]
    pairs = list(zip(report.sites, extracts, strict=True))
    rejected = [(site, extract) for site, extract in pairs if site.status == "rejected"]
    cases: dict[str, _Case] = {}
    for site, extract in rejected or pairs:
        parts = _parts(site, extract)
        key = repr((parts, [r.code for r in site.rejections]))
        cases.setdefault(key, _Case(site, parts)).layers.append(site.layer)
    return {f"{n:02d}_{case.name}": case.text() for n, case in enumerate(cases.values(), 1)}


def write_programs(report: Report, found: Found, folder: Path) -> list[Path]:
    """Write the programs into a new folder; return their paths. Raises SaveError AR601 where ``folder`` exists."""
    from attnrewrite.saving import new_folder

    with new_folder(folder, overwrite=False) as making:
        names = programs(report, found)
        for name, text in names.items():
            (making / name).write_text(text, encoding="utf-8")
    return [folder / name for name in names]


def _parts(site: Site, extract: Extract) -> dict[str, str]:
    """Return what stands in the holes of the template."""
    extract = onwards(extract)
    nodes = _with_constants(extract)
    whole = Extract(nodes, extract.roles)
    names = _names([*whole.inputs, *nodes], extract.roles)
    entering = [node for node in whole.inputs if tensor(node) is not None]
    weights = [node for node in entering if is_weight(node)]
    given = [node for node in entering if node not in weights]
    imports, call = _PLAIN
    if site.status == "rejected" and site.variant not in ("", "sdpa"):
        config = repr({"variant": site.variant, **site.config})
        imports, call = (
            _VARIANT,
            f"explain_capture(capture_model(Case().eval(), inputs, {{}}), VariantConfig.from_dict({config}))",
        )
    return {
        "imports": imports,
        "weights": _weights(weights, names),
        "arguments": ", ".join(["self", *(names[node] for node in given)]),
        "body": _body(whole, extract.outputs, names, weights),
        "inputs": "".join(f"        {_random(node)},  # {names[node]}\n" for node in given),
        "call": call,
    }


def _weights(weights: list[fx.Node], names: Mapping[fx.Node, str]) -> str:
    if not weights:
        return ""
    lines = ["    def __init__(self):", "        super().__init__()"]
    for node in weights:
        value = f"torch.nn.Parameter({_random(node)})" if _is_float(node) else _random(node)
        register = (
            f"self.{names[node]} = {value}" if _is_float(node) else f'self.register_buffer("{names[node]}", {value})'
        )
        lines.append(f"        {register}")
    return "\n".join([*lines, "", ""])


def _body(extract: Extract, leaving: list[fx.Node], names: Mapping[fx.Node, str], weights: list[fx.Node]) -> str:
    held = {node: f"self.{names[node]}" for node in weights}
    words = {**names, **held}
    lines = [f"{names[node]} = {_call(node, words)}{_comment(node)}" for node in extract.nodes]
    outputs = [names[node] for node in leaving if tensor(node) is not None]
    lines.append(f"return {', '.join(outputs)}")
    return "\n".join(f"        {line}" for line in lines)


def _comment(node: fx.Node) -> str:
    value = tensor(node)
    return "" if value is None else f"  # {[_number(size) for size in value.shape]}"


def _with_constants(extract: Extract) -> list[fx.Node]:
    """Return the nodes with all that they need and that depends on no input, in order."""
    known: dict[fx.Node, bool] = {}

    def fixed(node: fx.Node) -> bool:
        if node not in known:
            number = node.op == "placeholder" and NUMBER in node.meta
            plain = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
            known[node] = number or (plain and tensor(node) is not None and all(map(fixed_value, node.all_input_nodes)))
        return known[node]

    def fixed_value(node: fx.Node) -> bool:
        return tensor(node) is None or fixed(node)

    found, todo = set(extract.nodes), [node for node in extract.inputs if tensor(node) is not None]
    while todo:
        node = todo.pop()
        if node not in found and fixed(node):
            found.add(node)
            todo += [x for x in node.all_input_nodes if tensor(x) is not None]
    return sorted(found)


def _names(nodes: Iterable[fx.Node], roles: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Name values by their role or operator, so that equal layers give equal programs."""
    taken, names = {"self", "torch"}, dict[fx.Node, str]()
    for node in nodes:
        target = getattr(node.target, "_schema", None)
        base = (
            str(target.name).rpartition("::")[2] if target is not None else str(getattr(node.target, "__name__", "x"))
        )
        if node.op != "call_function" or roles.get(node) in ("query", "key", "value", "mask", "bias"):
            base = roles.get(node) or "x"
        base = re.sub(r"\W", "_", base)
        base = f"{base}_" if keyword.iskeyword(base) else base
        names[node] = next(name for name in _numbered(base) if name not in taken)
        taken.add(names[node])
    return names


def _numbered(base: str) -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}_{number}"
        number += 1


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """Write one node as Python."""
    if node.op == "placeholder":  # a number that the model's code holds
        return f"torch.tensor({_literal(node.meta[NUMBER], names)}, dtype={node.meta['val'].dtype})"
    words = [_literal(x, names) for x in node.args]
    if is_mode_switch(node):
        home = "torch._C" if node.target is torch._C._set_grad_enabled else "torch.amp.autocast_mode"
        return f"{home}.{getattr(node.target, '__name__', '')}({', '.join(words)})"
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"{words[0]}[{words[1]}]"
    words += [f"{key}={_literal(x, names)}" for key, x in node.kwargs.items()]
    return f"torch.ops.{node.target}({', '.join(words)})"


def _literal(value: Any, names: Mapping[fx.Node, str]) -> str:
    """Write an argument as Python; a size that is symbolic gets the number it had."""
    if isinstance(value, fx.Node):
        return (
            names[value]
            if value.meta.get("val") is None or tensor(value) is not None or value in names
            else repr(_number(value.meta["val"]))
        )
    if isinstance(value, list | tuple):
        inner = ", ".join(_literal(x, names) for x in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, torch.SymInt):
        return repr(_number(value))
    if isinstance(value, float) and not abs(value) < float("inf"):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    return repr(value)


def _number(size: Any) -> Any:
    """Return the number that a symbolic size had when the graph was captured."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else _UNKNOWN


def _is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _random(node: fx.Node) -> str:
    """Write random values of the node's shape, dtype and device."""
    value = node.meta["val"]
    shape = tuple(_number(size) for size in value.shape)
    where = "" if value.device.type == "cpu" else f', device="{value.device}"'
    if _is_float(node):
        return f"torch.randn({shape}, dtype={value.dtype}{where})"
    if value.dtype == torch.bool:
        return f"torch.rand({shape}{where}) < 0.7"
    return f"torch.randint(2, {shape}, dtype={value.dtype}{where})"

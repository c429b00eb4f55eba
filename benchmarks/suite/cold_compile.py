"""One cold compile, to be run in a fresh process: prints the seconds of its parts as JSON.

Takes size, depth and provider ("attnrewrite", or a torch.compile backend to compare with) as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from suite.llama import Logits, token_ids


def main() -> None:
    size = json.loads(sys.argv[1])
    provider, seconds = size["provider"], dict[str, float]()
    model, ids = Logits(size, "eager", size["depth"]).eval(), token_ids(size)
    torch._dynamo.list_backends()
    if provider == "attnrewrite":
        compiled = _ours(model, size["inner"], seconds)
    else:
        compiled = torch.compile(model, backend=provider)
    with torch.no_grad():
        first, second = (_timed(compiled, ids) for _ in range(2))
    seconds["cold compile"] = first - second
    sys.stdout.write(json.dumps(seconds))


def _ours(model: torch.nn.Module, inner: str, seconds: dict[str, float]) -> Any:
    """Compile with this backend, and take the time of its parts."""
    start = time.perf_counter()
    from attnrewrite import backend

    seconds["import of the backend"] = time.perf_counter() - start
    for name, label in (("from_dynamo", "re-trace"), ("compile_inner", "inner compiler")):
        setattr(backend, name, _watched(getattr(backend, name), label, seconds))

    def report(found: Any) -> None:
        rewritten = sum(site.status == "rewritten" for site in found.sites)
        if rewritten != len(model.model.model.layers):  # type: ignore[union-attr, arg-type]  # a Llama
            raise RuntimeError(f"only {rewritten} layers were rewritten")
        for step, taken in found.timings_ms.items():
            seconds[step] = seconds.get(step, 0.0) + taken / 1e3

    return torch.compile(model, backend=backend.Backend(inner=inner, strict=True, report=report))


def _watched(function: Callable[..., Any], label: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

    return watched


def _timed(compiled: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    compiled(ids)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""The registry: every benchmark by name, with its question and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from attnrewrite.bench.clock import Tick
from suite.figures import Result

Size = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One benchmark; ``sizes`` maps a profile to the argument of its ``run``, "smoke" to a tiny one."""

    name: str
    question: str
    module: str
    sizes: Mapping[str, Size]

    def run(self, profile: str, tick: Tick) -> Result:
        """Measure."""
        result: Result = import_module(f"suite.entries.{self.module}").run(self.sizes[profile], tick)
        return result


_LLAMA = {"hidden": 512, "mlp": 1376, "heads": 8, "kv_heads": 4, "vocabulary": 256}
_TINY = {"hidden": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "vocabulary": 96}
_LARGE = {"hidden": 2048, "mlp": 5504, "heads": 16, "kv_heads": 8, "vocabulary": 256}
_CPU = {"device": "cpu", "dtype": "float32"}
_GPU = {"device": "cuda", "dtype": "bfloat16"}
_VERSUS = {
    "cpu": {
        **_LLAMA,
        **_CPU,
        "layers": 2,
        "length": 2048,
        "threads": [1, 2],
        "rounds": 5,
        "training_rounds": 3,
    },
    "gpu": {
        **_LARGE,
        **_GPU,
        "layers": 4,
        "length": 4096,
        "threads": [None],
        "seconds": 150,
        "rounds": 50,
        "training_rounds": 25,
    },
    "smoke": {**_TINY, **_CPU, "layers": 1, "length": 16, "threads": [1], "rounds": 2, "training_rounds": 2},
}

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            "kernels",
            "How fast are the generated kernels beside their peers, and do they reach their goals?",
            "kernels",
            {
                "gpu": {**_GPU, "compiled": True, "rounds": 20, "cases": {}, "seconds": 510, "beforehand": 200},
                "smoke": {
                    **_CPU,
                    "compiled": False,
                    "rounds": 1,
                    "cases": {
                        "P1": (1, 2, 40, 16),
                        "P2": (1, 1, 20, 32),
                        "block": (1, 2, 20, 16),
                        "decode": (1, 2, 40, 16),
                        "memory": (1, 1, 40, 16),
                    },
                    "seconds": 120,
                    "beforehand": 60,
                },
            },
        ),
        Entry(
            "llama_eager",
            "How much faster is a Llama with eager attention through this backend than through inductor?",
            "llama_eager",
            _VERSUS,
        ),
        Entry(
            "attention_eager",
            "The same for one attention layer of that Llama, projections and rotary embedding included.",
            "attention_eager",
            _VERSUS,
        ),
        Entry(
            "compile_share",
            "How much of a cold compile is spent in the passes?",
            "compile_share",
            {
                "cpu": {**_LLAMA, "length": 2048, "depths": {4: 2, 12: 1, 30: 1}, "inner": "inductor"},
                "smoke": {**_TINY, "length": 16, "depths": {1: 1}, "inner": "aot_eager"},
            },
        ),
        Entry(
            "import_time",
            "How long until the package is imported, and until the command line answers?",
            "import_time",
            {"cpu": {"rounds": 15}, "smoke": {"rounds": 1}},
        ),
        Entry(
            "tuning_store",
            "How long do lookups of tuning records take, in a small store, a large one and a shared one that is down?",
            "tuning_store",
            {
                "cpu": {"records": 100_000, "launched": 50, "calls": 100_000, "rounds": 9, "fresh": 7},
                "smoke": {"records": 20, "launched": 5, "calls": 10, "rounds": 2, "fresh": 1},
            },
        ),
        Entry(
            "tuning_search",
            "How near is a tuned configuration to the best of all, and do tuners agree?",
            "tuning_search",
            {
                "cpu": {"kernels": 300, "sigmas": [0.05, 0.08, 0.12], "tuners": 8},
                "smoke": {"kernels": 2, "sigmas": [0.05], "tuners": 2},
            },
        ),
        Entry(
            "recognise",
            "How does the time of recognition grow with the number of layers?",
            "recognise",
            {
                "cpu": {**_TINY, "shapes": [(8, 64), (32, 64), (128, 64), (8, 2048)], "rounds": 9},
                "smoke": {**_TINY, "shapes": [(1, 8), (2, 8)], "rounds": 2},
            },
        ),
        Entry(
            "memory",
            "How much memory do the attentions take, and how does it grow with the length?",
            "memory",
            {
                "cpu": {"heads": 8, "width": 64, "length": 8192, "lengths": [2048, 4096, 8192, 16384]},
                "smoke": {"heads": 2, "width": 8, "length": 256, "lengths": [128, 256]},
            },
        ),
        Entry(
            "variants",
            "How long do the attentions take beside their dense forms and torch's fused attention?",
            "variants",
            {
                "cpu": {"heads": 8, "width": 64, "lengths": [512, 2048, 8192], "rounds": 5, "training_rounds": 3},
                "smoke": {"heads": 2, "width": 8, "lengths": [64], "rounds": 2, "training_rounds": 1},
            },
        ),
        Entry(
            "matchers",
            "How much attention do this recogniser and inductor's patterns find, and how fast?",
            "matchers",
            {
                "cpu": {
                    **_TINY,
                    "length": 64,
                    "spread": 20,
                    "cells": None,
                    "families": None,
                    "fresh": 9,
                    "depths": [8, 16, 32, 64, 128],
                    "rounds": 7,
                },
                "smoke": {
                    **_TINY,
                    "length": 8,
                    "spread": 20,
                    "cells": 2,
                    "families": 1,
                    "fresh": 1,
                    "depths": [1, 2],
                    "rounds": 2,
                },
            },
        ),
    )
}
PROFILES = ("cpu", "gpu", "smoke")

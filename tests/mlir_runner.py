"""Run exported MLIR on the CPU: what the torch-mlir wheel has of its reference backend, and LLVM's JIT."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy
import torch
from torch_mlir import ir
from torch_mlir.dialects import torch as torch_dialect
from torch_mlir.execution_engine import ExecutionEngine
from torch_mlir.passmanager import PassManager
from torch_mlir.runtime import UnrankedMemRefDescriptor, get_unranked_memref_descriptor, unranked_memref_to_numpy

_BUFFERIZE = "copy-before-write bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map"
_PASSES = [
    "func.func(refback-generalize-tensor-pad)",
    "func.func(refback-generalize-tensor-concat)",
    "func.func(tm-tensor-bufferize)",
    f"one-shot-bufferize{{{_BUFFERIZE}}}",
    "refback-mlprogram-bufferize",
    "refback-munge-calling-conventions",
    "func.func(tm-tensor-to-loops)",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm)",
    "func.func(arith-expand)",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "finalize-memref-to-llvm",
    "lower-affine",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-vector-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-complex-to-llvm",
    "reconcile-unrealized-casts",
]
_RETURN = "refbackend_consume_func_return_"
_DTYPES = {"mrf32": numpy.float32, "mrf64": numpy.float64, "mri64": numpy.int64, "mri1": numpy.bool_}


class Program:
    """A file of format ``mlir-linalg``, compiled; call it with the program's tensors."""

    def __init__(self, path: Path) -> None:
        context = ir.Context()
        torch_dialect.register_dialect(context)
        with context, ir.Location.unknown():
            # To run a pass registers what it depends on: the dialect of sorts and running sums.
            PassManager.parse("builtin.module(func.func(convert-torch-to-tmtensor))").run(ir.Module.create().operation)
            module = ir.Module.parse(path.read_text())
            PassManager.parse(f"builtin.module({','.join(_PASSES)})").run(module.operation)
            names = [str(op.attributes["sym_name"]).strip('"') for op in module.body]
            self._engine = ExecutionEngine(module, opt_level=0)
        self._results: list[torch.Tensor] = []
        self._callbacks = [self._registered(name) for name in names if name.startswith(_RETURN)]

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Run ``main``; the results are copies."""
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        descriptors = [ctypes.pointer(ctypes.pointer(get_unranked_memref_descriptor(array))) for array in arrays]
        self._engine.invoke("main", *descriptors)
        return self._results

    def _registered(self, name: str) -> object:
        """Let the program hand its results over; the callback has to live as long as the engine."""
        dtypes = [_DTYPES[kind] for kind in name.removeprefix(_RETURN).split("_")]

        def consume(*found: object) -> None:
            pairs = zip(found, dtypes, strict=True)
            self._results = [torch.from_numpy(unranked_memref_to_numpy(x, t).copy()) for x, t in pairs]

        kind = ctypes.CFUNCTYPE(None, *(ctypes.POINTER(UnrankedMemRefDescriptor) for _ in dtypes))
        callback = kind(consume)
        self._engine.register_runtime(name, callback)
        return callback

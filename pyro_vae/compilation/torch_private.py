"""The private interfaces of torch that the package uses: they are imported here and nowhere else.

A new version of torch may change them. ``pyproject.toml`` therefore bounds it, and tests run for each version allowed.
"""

import logging
import os
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack  # leaves the innermost `torch.vmap`
from torch._subclasses import FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.experimental.proxy_tensor import (
    make_fx,  # records the operations of a function, with those of functionalization
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef  # whether the memory of a tensor is still that of it
from torch.utils._python_dispatch import TorchDispatchMode  # sees each operation and what it writes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten  # the tensors in the arguments of `SVI.step`

__all__ = [
    "StorageWeakRef", "TorchDispatchMode", "TreeSpec", "backward_number", "batched", "compile_graph",
    "compile_into_cache", "forced_compiling_flag", "functional", "is_batched", "is_compiler_missing", "is_operation",
    "make_fx", "next_autograd_number", "onednn", "onednn_linear", "operation_schema", "outside_vmap", "quiet_vmap",
    "raw_operation", "tree_flatten", "tree_unflatten", "unbatched", "without_onednn", "without_torch_function",
    "wrapper_tensor", "written_arguments",
]  # fmt: skip

_compiler_config: Any = compiler_config

_OPTIONS: dict[str, Any] = {"fallback_random": True, "size_asserts": False}  # draw the random numbers of an eager step

_CPU_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,  # calls one kernel after the other without Python; for CUDA it needs headers torch lacks
    "cpp.min_chunk_size": 2**14,  # numbers per thread: to start a thread for fewer takes longer than to compute them
    # A file of 140 MB, which takes three seconds to make, as long as it saves in the compilation of five graphs:
    "cpp_cache_precompile_headers": False,
}


def compile_graph(module: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph of operations with inductor, or load it from torch's cache of compiled graphs.

    Where no files can be written for the cache, compile into a folder that is then removed.
    """
    try:
        return compile_into_cache(module, examples)
    except (OSError, RuntimeError) as error:
        if not isinstance(getattr(error, "inner_exception", error), OSError):
            raise
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    with TemporaryDirectory() as folder, temporary_cache_dir(folder):
        return compile_into_cache(module, examples)


def compile_into_cache(module: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph, or load it from the cache; without inductor's warnings and logs.

    Raises:
        OSError: if no files can be written there, or a RuntimeError with it as ``inner_exception``.
    """
    options = _OPTIONS | (_CPU_OPTIONS if all(tensor.is_cpu for tensor in examples) else {})
    # Without a context of shapes, which `torch.compile` makes, inductor does not use its cache of graphs.
    context = torch._guards.TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            torch.no_grad(), warnings.catch_warnings(), torch._guards.tracing(context),
            _compiler_config.patch(cache_key_tag=_compiler_config.cache_key_tag + _operations()),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            from torch._inductor import compile_fx, cpp_builder, cpu_vec_isa  # takes a second

            _call_onednn_directly()
            with (
                patch.object(cpp_builder, "run_compile_cmd", _whole_files(cpp_builder.run_compile_cmd)),
                patch.object(cpu_vec_isa.VecISA, "check_build", _quick_check(cpu_vec_isa.VecISA.check_build)),
            ):
                compiled: Any = compile_fx.compile_fx(
                    module, list(examples), config_patches=options, ignore_shape_env=True
                )
                return compiled
    finally:
        logger.setLevel(level)


@cache
def _operations() -> str:
    """Return a name for the operations of this module as they are: the cache knows operations by their names alone."""
    return sha256(Path(__file__).read_bytes()).hexdigest()


def _whole_files(build: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Let a command of the compiler write its result under another name first: what is stopped leaves none behind.

    Inductor takes any file that is there as the result.
    """

    def run(command: str, cwd: str) -> None:
        words = shlex.split(command)
        if "-o" not in words[:-1]:
            return build(command, cwd)
        place = words.index("-o") + 1
        target, written = words[place], f"{words[place]}.{os.getpid()}.part"
        words[place] = written
        try:
            build(shlex.join(words), cwd)
            os.replace(written, target)
        finally:
            with suppress(FileNotFoundError):
                os.remove(written)

    return run


_INCLUDED = {"AVX512": ("AVX512", "AVX2"), "AVX2": ("AVX2",)}
"""By the instructions that torch's own operations use, those that compiled code can use with its libraries."""


def _quick_check(check: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    """Find the vector instructions that can be used by torch's own use of them and the compiler's options alone.

    Inductor compiles, links and loads six programs for that, which takes five seconds.
    """

    def run(instructions: Any, code: str) -> bool:
        from torch._inductor import cpp_builder

        if str(instructions).split()[0].upper() not in _INCLUDED.get(torch.backends.cpu.get_cpu_capability(), ()):
            return check(instructions, code)
        options = instructions.build_arch_flags().split()
        try:
            command = [cpp_builder.get_cpp_compiler(), *options, "-fsyntax-only", "-x", "c++", os.devnull]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except (OSError, RuntimeError):  # there is no compiler
            return False

    return run


def is_compiler_missing(error: BaseException) -> bool:
    """Whether inductor raised an error because there is no working C++ compiler."""
    return type(error).__name__ in ("InvalidCxxCompiler", "CppCompileError")


@contextmanager
def forced_compiling_flag() -> Iterator[None]:
    """Make ``torch.compiler.is_compiling()`` true in a block: torch's optimizers then read no value of a tensor."""
    with patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


@contextmanager
def onednn(enabled: bool = True) -> Iterator[None]:
    """Run a block with oneDNN or without, by its switch alone: ``torch.backends.mkldnn.flags`` warns about another."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def without_onednn() -> AbstractContextManager[None]:
    """Run a block without oneDNN."""
    return onednn(False)


def next_autograd_number() -> int:
    """Return the number that autograd gives to the next operation that it differentiates."""
    return torch._C._autograd._get_sequence_nr()


def backward_number() -> int | None:
    """Return the number of the operation whose backward pass runs, or ``None``."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def is_operation(target: Any) -> bool:
    """Whether the target of a node is an operation of torch or of one of its libraries."""
    return isinstance(target, torch._ops.OpOverload)


def operation_schema(operation: Any) -> Any:
    """Return the signature of an operation, which names the arguments that it writes to."""
    return operation._schema


def raw_operation(operation: Any) -> Any:
    """Return what an operation calls, without a call of Python in between."""
    return getattr(operation, "_op", operation)


def functional(operation: Any) -> Any:
    """Return the operation that computes what an in-place one writes, or ``None``."""
    name, overload = operation._schema.name.removeprefix("aten::"), operation._schema.overload_name or "default"
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found: Any = getattr(packet, overload, None)
    same = found is not None and len(found._schema.arguments) == len(operation._schema.arguments)
    return found if same and not found._schema.is_mutable else None


def written_arguments(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to, but for those that it does not declare."""
    schema: Any = getattr(operation, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Any] = []
    for place, one in enumerate(schema.arguments):
        if one.alias_info is not None and one.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(one.name)
            found += [item for item in (value if isinstance(value, list | tuple) else [value]) if item is not None]
    return found


_library = torch.library.Library("pyro_vae", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias`` with oneDNN, which torch calls by itself in compiled inference only."""
    return torch.ops.pyro_vae.linear(x, weight, bias)


@torch.library.impl(_library, "linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("pyro_vae::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@cache
def _call_onednn_directly() -> None:
    """Let compiled graphs call oneDNN from C++, and transpose its arguments in the loops that compute them.

    Inductor does so for constant weights only, and would call an operation that it does not know through Python.
    """
    from torch._inductor import lowering, mkldnn_ir
    from torch._inductor.ir import TensorBox

    @lowering.register_lowering(torch.ops.pyro_vae.linear.default, type_promotion_kind=None)
    def _(x: Any, weight: Any, bias: Any) -> Any:
        return TensorBox.create(mkldnn_ir.LinearUnary.create(x, weight, bias, "none", [], ""))


_functorch: Any = torch._C._functorch


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor inside of ``torch.vmap`` depends on the mapped dimension."""
    return _functorch.is_batchedtensor(tensor)


@contextmanager
def outside_vmap() -> Iterator[int | None]:
    """Run a block inside of ``torch.vmap`` as if it were outside; give the level of the vmap, ``None`` without one."""
    level = _functorch.maybe_current_level()
    with nullcontext() if level is None else temporarily_pop_interpreter_stack():
        yield level


def batched(tensor: Tensor, level: int | None) -> Tensor:
    """Make a tensor ``(C, *shape)`` one of ``(*shape)`` inside of the vmap of this level."""
    return tensor if level is None else _functorch._add_batch_dim(tensor, 0, level)


def unbatched(tensor: Tensor, level: int | None, count: int) -> Tensor:
    """Return the tensor ``(C, *shape)`` of a tensor ``(*shape)`` inside of the vmap of this level."""
    return tensor if level is None else _functorch._remove_batch_dim(tensor, level, count, 0)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Run a block without the warnings of operations that ``torch.vmap`` runs draw by draw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


def without_torch_function() -> Any:
    """Run a block in which subclasses of tensors see operations below ``__torch_function__`` alone."""
    return torch._C.DisableTorchFunctionSubclass()


def wrapper_tensor(
    subclass: type[Tensor], shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Any:
    """Return a tensor of a subclass that has a shape and no memory: the subclass runs each operation on it."""
    return Tensor._make_wrapper_subclass(subclass, shape, strides=strides, dtype=dtype, device=device)

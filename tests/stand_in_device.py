"""A device ``gpu:0`` for machines without one: tensors that hold CPU numbers, and raise where devices mix as CUDA does.

Factories, copies and random numbers go through a dispatch mode. Random numbers on the device come from a random state
of its own. What it cannot show are numerics and streams of CUDA. :func:`stand_in_device` changes the whole process: use
it in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "gpu:0"
_COPIES = {"copy_", "_to_copy", "_local_scalar_dense", "lift_fresh", "_copy_from", "set_data", "_foreach_copy_"}
_TAKE_CPU_NUMBERS = {
    "where", "masked_fill", "masked_fill_", "fill_", "fill", "lerp", "lerp_", "addcmul", "addcmul_", "addcdiv_",
    "clamp", "pow", "index_fill_", "full",
}  # fmt: skip


class MixedDevices(RuntimeError):
    """Error for an operation on tensors of two devices."""


class OnDevice(torch.Tensor):
    """A tensor that is said to be on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), layout=inner.layout, device=torch.device(GPU), requires_grad=False, **options
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **options):
        return f"OnDevice({self.inner!r})"

    def __deepcopy__(self, memo):
        new = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):
        """Store the numbers, as a file does that is read on a machine without the device."""
        inner = self.inner.detach().clone()
        if getattr(self, "_is_param", False):
            inner = torch.nn.Parameter(inner, self.requires_grad)
        return inner.__reduce_ex__(protocol)

    def as_subclass(self, cls):
        """Return the shell that Pyro's provenance tracking puts around a tensor."""
        return self.inner.as_subclass(cls)

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else self.inner, spec)

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return made.requires_grad_(requires_grad)

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def numpy(self, **options):
        raise TypeError(f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args, **options):
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Module:
    """The module ``torch.gpu`` of the device, with its random state."""

    def __init__(self):
        self.manual_seed_all(torch.initial_seed() + 1)  # other numbers than those of the CPU

    def is_initialized(self):
        return True

    is_available = is_initialized

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        self._state = torch.Generator("cpu").manual_seed(seed + 1).get_state()

    def get_rng_state(self, device=GPU):
        return self._state.clone()

    def set_rng_state(self, state, device=GPU):
        self._state = state.clone()

    @contextmanager
    def drawing(self):
        """Draw the numbers of a block from the state of the device."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(before)


class _Dispatch(TorchDispatchMode):
    """Runs operations that have the device as an argument, such as factories."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        if _names_gpu(kwargs.get("device")) or any(isinstance(value, OnDevice) for value in flat):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def stand_in_device() -> Iterator[torch.device]:
    """Run a block in which the device exists. It stays registered in this process."""
    _setup_privateuseone_for_python_backend("gpu", _Module())
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def make(data, *args, device=None, **options):
        with _disable_current_modes():
            found = tensor(_unwrap(data.detach()) if isinstance(data, torch.Tensor) else data, *args, **options)
        return _wrap(found) if _names_gpu(device or _default_device()) else found

    def convert(data, *args, device=None, **options):
        if isinstance(data, torch.Tensor):
            return as_tensor(data, *args, device=device, **options)
        with _disable_current_modes():
            found = as_tensor(data, *args, **options)
        return _wrap(found) if _names_gpu(device or _default_device()) else found

    torch.tensor, torch.as_tensor = make, convert
    try:
        with _Dispatch():
            yield torch.device(GPU)
    finally:
        torch.tensor, torch.as_tensor = tensor, as_tensor


def _default_device() -> Any:
    """Return the default device, by which ``torch.get_default_device`` would call ``torch.tensor`` again."""
    modes = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return modes[-1] if modes else None


def _names_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "gpu"


def _is_generator(value):
    return isinstance(value, torch.Generator)


def _wrap(value):
    return OnDevice(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) else value


def _unwrap(value):
    return value.inner if isinstance(value, OnDevice) else value


def _run(func, args, kwargs):
    """Run an operation on the numbers, and wrap its results if it is one of the device."""
    _check(func, args, kwargs)
    name, flat = func._schema.name, tree_flatten((args, kwargs))[0]
    if name == "aten::_local_scalar_dense":
        return func(_unwrap(args[0]))
    if name == "aten::copy_":
        func(_unwrap(args[0]), _unwrap(args[1]), *args[2:], **kwargs)
        return args[0]
    device = kwargs.get("device")
    on_device = any(isinstance(value, OnDevice) for value in flat) if device is None else _names_gpu(device)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if on_device else device}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    own = on_device and torch.Tag.nondeterministic_seeded in func.tags and not any(map(_is_generator, flat))
    with torch.gpu.drawing() if own else nullcontext():
        found = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, found)) if on_device else found


def _check(func, args, kwargs):
    """Raise where CUDA would: for tensors, or a generator, of another device."""
    name, flat = func._schema.name.removeprefix("aten::"), tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    generator = next(filter(_is_generator, flat), None)
    if generator is not None and (generator.device.type == "gpu") != bool(
        on_device or _names_gpu(kwargs.get("device"))
    ):
        raise MixedDevices(f"Expected a generator of the same device: {name}")
    if not on_cpu or not on_device or name in _COPIES:
        return
    if name in ("index", "_unsafe_index") and isinstance(args[0], OnDevice):
        return  # indices may be on the CPU
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        fits = isinstance(args[0], OnDevice) and (isinstance(args[2], OnDevice) or args[2].dim() == 0)
    else:
        takes_numbers = torch.Tag.pointwise in func.tags or name in _TAKE_CPU_NUMBERS
        takes_numbers = takes_numbers or name.startswith(("_foreach", "_fused"))
        changes_cpu = name.endswith("_") and not isinstance(args[0], OnDevice | list | tuple)
        fits = takes_numbers and all(tensor.dim() == 0 for tensor in on_cpu) and not changes_cpu
    if not fits:
        shapes = ", ".join(f"{tensor.device.type} {tuple(tensor.shape)}" for tensor in tensors)
        raise MixedDevices(f"Expected all tensors to be on the same device: {name} of {shapes}")

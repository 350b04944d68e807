"""A second device without one: tensors on `twin` hold real values (on the CPU) and refuse to meet tensors elsewhere.

Let accelerate take it with `ACCELERATE_TORCH_DEVICE=twin`. What waits for a device is counted in :data:`READS`, by the
line that asked: a value that Python looks at, a size that hangs on one, a copy to the CPU. It rests on a part of torch
(2.13) that is not public, and by which there can be one such device only.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import library
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

READS: Counter[str] = Counter()  # by "file:line" of the project, or "of package/file:line"
INDEXED = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}  # indices may be CPU
LOOKS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
DECOMPOSES = ("aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_qr", "aten::linalg_cholesky_ex")  # they check


class Backend:
    """What torch asks of a device's module."""

    current = 0

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @classmethod
    def current_device(cls) -> int:
        return cls.current

    @classmethod
    def set_device(cls, device: Any) -> None:
        cls.current = device if isinstance(device, int) else torch.device(device).index or 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """The CPU's generator is the only one."""

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Nothing is ever on its way."""

    @staticmethod
    def empty_cache() -> None:
        """Nothing is cached."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("twin", backend_module=Backend)


class Twin(torch.Tensor):
    """A tensor on a twin device, around the CPU's tensor `elem`."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, index: int = 0) -> Twin:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device("twin", index),
        )

    def __init__(self, elem: torch.Tensor, index: int = 0) -> None:
        self.elem = elem.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found = Twin(self.elem.clone(), self.device.index).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            found = torch.nn.Parameter(found, self.requires_grad)
        memo[id(self)] = found
        return found

    @property
    def data(self) -> Any:
        return Twin(self.elem, self.device.index)

    @data.setter
    def data(self, value: Twin) -> None:
        torch.Tensor.data.__set__(self, value)
        self.elem = value.elem

    def tolist(self) -> Any:
        _note()
        return self.elem.tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"Twin({self.elem!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _note() -> None:
    """One more read, of the innermost line that is not torch's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            parts = file.rpartition("/site-packages/" if "/site-packages/" in file else "/pm_llm/")
            READS[f"{'' if parts[1] == '/pm_llm/' else 'of '}{parts[2]}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back


@contextmanager
def counted() -> Any:
    """Within the block the reads are counted anew, and given."""
    before = READS.copy()
    READS.clear()
    found: Counter[str] = Counter()
    try:
        yield found
    finally:
        found.update(READS)
        READS.update(before)


def _unwrapped(x: Any) -> Any:
    return x.elem if isinstance(x, Twin) else x


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.name()
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    twins = [x for x in tensors if isinstance(x, Twin)]
    if name == "aten::copy_":
        if not isinstance(args[0], Twin):
            _note()
        _unwrapped(args[0]).copy_(_unwrapped(args[1]))
        return args[0]
    by_mask = name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
    if name in LOOKS or by_mask or name.startswith(DECOMPOSES):  # a mask's number of entries is the result's size
        _note()
    device = kwargs.get("device")
    if device is not None:
        return _made_on(torch.device(device), func, args, kwargs, twins)
    places = {x.device for x in tensors if x.dim() > 0 or x.device.type == "twin"}
    if len(places) > 1 and not (name in INDEXED and len({x.device for x in twins}) == 1):
        shapes = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found {shapes}")
    out = func(*pytree.tree_map(_unwrapped, args), **pytree.tree_map(_unwrapped, kwargs))
    index = twins[0].device.index if twins else Backend.current
    out = pytree.tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Twin) else Twin(x, index), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _made_on(device: torch.device, func: Any, args: Any, kwargs: Any, twins: list[Twin]) -> Any:
    """A tensor on a device that is named: new, or a copy from elsewhere."""
    to_twin = device.type == "twin"
    if twins and device.type == "cpu":
        _note()
    kwargs = {**kwargs, "device": device if device.type == "meta" else torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    given = [x.elem for x in twins]
    out = func(*pytree.tree_map(_unwrapped, args), **pytree.tree_map(_unwrapped, kwargs))
    if isinstance(out, torch.Tensor) and any(out is x for x in given):
        out = out.clone()  # on the CPU it is the same tensor; from one device to another it never is
    if not to_twin:
        return out
    index = Backend.current if device.index is None else device.index
    return pytree.tree_map_only(torch.Tensor, lambda x: Twin(x, index), out)


_kernels = library.Library("_", "IMPL")
_kernels.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")


def _autocast(op: Any) -> Any:
    """An operation that autocast makes in its lower precision."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        low, like = torch.get_autocast_dtype("twin"), torch.float32
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda x: x.to(low) if x.dtype == like else x, (args, kwargs)
            )
            return op(*args, **kwargs)

    return run


_kernels.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
_lower = library.Library("aten", "IMPL")
for _name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"):
    _lower.impl(_name, _autocast(getattr(torch.ops.aten, _name)), "AutocastPrivateUse1")


def _on_host(x: Any) -> Any:
    """The same with the CPU's tensors, as real devices are written to files."""
    if isinstance(x, Twin):
        return x.elem.clone()
    if isinstance(x, dict):
        return {key: _on_host(value) for key, value in x.items()}
    return type(x)(_on_host(value) for value in x) if type(x) in (list, tuple) else x


def _patched(name: str, made: Any) -> None:
    """torch.tensor and torch.as_tensor read Python's values on the CPU first."""

    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, (list, tuple)):
            data = [x.tolist() if isinstance(x, Twin) else x for x in data]
        kwargs |= {} if device is None or torch.device(device).type == "twin" else {"device": device}
        found = made(data, *args, **kwargs)
        found = found.to(device) if device is not None and torch.device(device).type == "twin" else found
        return found.requires_grad_() if requires_grad else found

    setattr(torch, name, make)


_device_constructors()  # `with torch.device(...)` knows what makes tensors by the functions there are when first asked
for _name in ("tensor", "as_tensor"):
    _patched(_name, getattr(torch, _name))
_pointers, _save = safetensors.torch._flatten_as_ptr, torch.save
safetensors.torch._flatten_as_ptr = lambda tensors, *alive: _pointers(_on_host(tensors), *alive)
torch.save = lambda obj, *args, **kwargs: _save(_on_host(obj), *args, **kwargs)
torch.Tensor.pin_memory = lambda self, *_, **__: self

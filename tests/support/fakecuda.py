"""A pretend CUDA device: run code "on cuda:0" with a CPU-only build of torch, under CUDA's rules.

    from support import fakecuda

    fakecuda.require()                                   # skips the test where there is no C++ compiler
    with fakecuda.session() as stats:
        credit = assign_credit("hapo", fakecuda.cuda(batch))
    torch.testing.assert_close(fakecuda.cpu(credit), expected)
    print(stats.kernels, stats.syncs, stats.sync_at.most_common(5))

A `PretendTensor` says that it is on cuda:0 and holds a CPU tensor. During a session a dispatch mode makes factories
with `device="cuda"` return such tensors. An operation refuses what CUDA refuses: tensors of two devices (a CPU tensor
without dimensions is fine, and so are CPU indices into a CUDA tensor), a generator of the other device, conversion to
NumPy. Every operation counts as a kernel launch with the bytes that it reads and writes; whatever makes the host wait
counts as a synchronisation, with the line that caused it. Values are right, so code that depends on data runs.

Random operations on the device draw from `torch.cuda.default_generators[0]`, as on a real device, so a test sees
whether code moves that stream. Kernels, streams, autocast, memory and backward passes
are not imitated. All patches of torch end with the session.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import getpass
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
SOURCE = Path(__file__).with_name("guard.cpp")

# Operations that read the data of a tensor on the host, or whose result's shape depends on data.
WAITING = {
    *("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim"),
    *("unique_consecutive", "repeat_interleave.Tensor", "_linalg_svd"),
}
# Operations that launch no kernel, besides those that the schema calls views.
NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}


class DeviceFault(RuntimeError):
    """What a real CUDA device would have refused."""


@dataclasses.dataclass
class Stats:
    """Counts of one session; `faults` holds what was refused, also where the session is not strict."""

    kernels: int = 0
    bytes: int = 0
    syncs: int = 0
    ops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sync_at: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    strict: bool = True

    def sync(self, what: str) -> None:
        """Count one wait of the host for the device."""
        self.syncs += 1
        self.sync_at[what, _line()] += 1

    def fault(self, message: str) -> None:
        """Note what CUDA would refuse; raise it in a strict session."""
        self.faults[message] += 1
        if self.strict:
            raise DeviceFault(message)


class _Closed(Stats):
    """Stands where no session is open; tensors that outlive theirs count here."""


_stats: Stats = _Closed()  # of the innermost session


class PretendTensor(torch.Tensor):
    """A tensor that says cuda:0; `inner` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> "PretendTensor":
        """Wrap `inner`."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
            dispatch_device=True,
        )

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        """Values and device."""
        return f"pretend_cuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; the session's mode comes here too."""
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Values on the host, which waits for them."""
        _stats.sync("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as for a real CUDA tensor."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as for a real CUDA tensor."""
        return self.numpy()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        """A copy of `data` on this device, unless `device` says another."""
        kwargs = {"dtype": self.dtype, "device": CUDA, **kwargs}
        return torch.tensor(data, **kwargs)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Index; torch makes a list to a tensor of the device below Python, so that is done here."""
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Index; see `__getitem__`."""
        super().__setitem__(_lists_as_tensors(index), value)


class _PretendGenerator(torch.Generator):
    """A CPU generator that says it belongs to the device."""

    # An operation gets another Python object of the same generator: it is known by its address, while it is kept here.
    kept: ClassVar[dict[int, torch.Generator]] = {}

    device = property(lambda self: CUDA)

    def __init__(self) -> None:
        self.kept[self._cdata] = self


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")) or any(
            isinstance(leaf, PretendTensor) for leaf in tree_leaves((args, kwargs))
        ):
            return _run(func, args, kwargs)
        _check_generator(func._schema.name, kwargs.get("generator"), on_cuda=False)
        return func(*args, **kwargs)


@contextlib.contextmanager
def session(strict: bool = True) -> Iterator[Stats]:
    """Pretend that the machine has one CUDA device; the value counts what happens on it.

    Args:
      strict: raise `DeviceFault` where CUDA would raise; otherwise only count it in `faults`.
    """
    global _stats
    outer, _stats = _stats, Stats(strict=strict)
    library = _library()
    library.install()
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in _patches():
                stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(_Mode())
            yield _stats
    finally:
        _stats = outer
        if isinstance(outer, _Closed):
            library.uninstall()
            _PretendGenerator.kept.clear()


def require() -> None:
    """Skip the calling test where the device cannot be pretended."""
    if shutil.which("g++") is None:
        pytest.skip("the pretend CUDA device needs g++")
    if torch.cuda.is_available() or torch.version.cuda is not None:
        pytest.skip("the pretend CUDA device needs a build of torch without CUDA")


def cuda(value: Any) -> Any:
    """A copy on the device: of a tensor, or of a dataclass, mapping or sequence with its tensors moved."""
    return _moved(value, lambda tensor: PretendTensor(tensor.detach().clone()))


def cpu(value: Any) -> Any:
    """The values on the CPU, without counting; the counterpart of `cuda`."""
    return _moved(value, lambda tensor: tensor.inner if isinstance(tensor, PretendTensor) else tensor)


def move_module(module: torch.nn.Module) -> torch.nn.Module:
    """Put a module's parameters and buffers on the device, in place, and return it; tied weights stay tied."""
    moved: dict[int, torch.Tensor] = {}

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            copy = PretendTensor(tensor.detach().clone())
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return moved[id(tensor)]

    for part in module.modules():
        for group in (part._parameters, part._buffers):
            group.update({name: on_device(tensor) for name, tensor in group.items() if tensor is not None})
    return module


def _moved(value: Any, move: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value) if item.init]
        return dataclasses.replace(value, **{name: _moved(getattr(value, name), move) for name in names})
    if isinstance(value, dict):
        return {key: _moved(item, move) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, move) for item in value)
    return value


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Check one operation against CUDA's rules, run it on the CPU, count it, and wrap its results."""
    if func is torch.ops.prim.device.default:
        return CUDA
    name = func._schema.name.split("::")[-1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretend = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    device = kwargs.get("device")
    to_cuda = _is_cuda(device)
    on_cuda = to_cuda or (bool(pretend) and device is None)
    _check_devices(name, args, tensors, pretend)
    _check_generator(name, kwargs.get("generator"), on_cuda)

    inner_kwargs = tree_map(_inner, dict(kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    draws = on_cuda and torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    with _drawing_on_device() if draws else contextlib.nullcontext():
        result = func(*tree_map(_inner, args), **inner_kwargs)
    _count(func, name, args, result, pretend=pretend, on_cuda=on_cuda)
    if not on_cuda or (name == "copy_" and not isinstance(args[0], PretendTensor)):
        return _same_objects(result, tensors)
    return tree_map(functools.partial(_wrapped, known={id(item.inner): item for item in pretend}), result)


def _check_devices(name: str, args: Any, tensors: list[torch.Tensor], pretend: list[PretendTensor]) -> None:
    on_host = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim() > 0]
    if not pretend or not on_host or name in COPIES:
        return
    if name in INDEXING and isinstance(args[0], PretendTensor):
        written = [item for item in args[2:3] if isinstance(item, torch.Tensor) and item.dim() > 0]
        if all(isinstance(item, PretendTensor) for item in written):
            _stats.sync("index on the CPU")
            return
    shapes = ", ".join(f"{'cuda' if isinstance(item, PretendTensor) else 'cpu'}{list(item.shape)}" for item in tensors)
    _stats.fault(f"{name} at {_line()}: tensors of two devices: {shapes}")


def _check_generator(name: str, generator: torch.Generator | None, on_cuda: bool) -> None:
    if generator is None or (generator._cdata in _PretendGenerator.kept) == on_cuda:
        return
    wanted, got = ("cuda", "cpu") if on_cuda else ("cpu", "cuda")
    _stats.fault(f"{name} at {_line()}: expected a {wanted!r} generator, got one of {got!r}")


def _count(func: Any, name: str, args: Any, result: Any, *, pretend: list[PretendTensor], on_cuda: bool) -> None:
    overloaded = f"{name}.{func._overloadname}"
    if pretend and (name in WAITING or overloaded in WAITING):
        _stats.sync(name)
    if name in INDEXING and pretend and any(getattr(item, "dtype", None) == torch.bool for item in args[1] or ()):
        _stats.sync("boolean index")
    crosses = name in COPIES and (on_cuda != bool(pretend) if name == "_to_copy" else _crosses(args))
    if crosses and (on_cuda or pretend):
        _stats.sync("copy between host and device")
    if not on_cuda or func.is_view or name in NO_KERNEL:
        return
    read_and_written = [*(item.inner for item in pretend), *tree_leaves(result)]
    _stats.kernels += 1
    _stats.ops[name] += 1
    _stats.bytes += sum(item.nbytes for item in read_and_written if isinstance(item, torch.Tensor))


def _crosses(args: Any) -> bool:
    return isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor)


def _same_objects(result: Any, tensors: list[torch.Tensor]) -> Any:
    """An operation in place returns the very tensor that it was given; here that is a CPU tensor already."""
    return tree_map(lambda item: next((known for known in tensors if known is item), item), result)


def _wrapped(item: Any, known: dict[int, PretendTensor]) -> Any:
    if not isinstance(item, torch.Tensor) or isinstance(item, PretendTensor):
        return item
    same = known.get(id(item))
    if same is None:
        return PretendTensor(item)
    if same.shape != item.shape:
        raise NotImplementedError("the pretend device cannot change a tensor's shape in place")
    return same


@contextlib.contextmanager
def _drawing_on_device() -> Iterator[None]:
    """Let CPU kernels draw from the device's default generator."""
    of_device, of_host = torch.cuda.default_generators[0], torch.default_generator
    kept = of_host.get_state()
    of_host.set_state(of_device.get_state())
    try:
        yield
    finally:
        of_device.set_state(of_host.get_state())
        of_host.set_state(kept)


def _patches() -> list[tuple[Any, str, Any]]:
    """What a session replaces: (object, attribute, value)."""
    make_tensor, make_as_tensor, make_generator = torch.tensor, torch.as_tensor, torch.Generator

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make_tensor(cpu(data), *args, device=None if _is_cuda(device) else device, **kwargs)
        return _sent(made, "torch.tensor") if _is_cuda(device) else made

    def as_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, PretendTensor):
            return data.to(*args, device=CUDA if device is None else device, **kwargs)
        made = make_as_tensor(data, *args, device=None if _is_cuda(device) else device, **kwargs)
        return _sent(made, "torch.as_tensor") if _is_cuda(device) else made

    class Generator(metaclass=_AnyGenerator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return _PretendGenerator() if _is_cuda(device) else make_generator(device)

    return [
        (torch, "tensor", tensor),
        (torch, "as_tensor", as_tensor),
        (torch, "Generator", Generator),
        (torch.cuda, "_initialized", True),
        *(
            (module, name, value)
            for name, value in (
                ("_lazy_init", lambda: None),
                ("device_count", lambda: 1),
                ("current_device", lambda: 0),
            )
            for module in (torch.cuda, torch.cuda.random)
        ),
        (torch.cuda, "default_generators", (_PretendGenerator(),)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # else autocast warns
    ]


class _AnyGenerator(type):
    """`isinstance(x, torch.Generator)` holds for generators from before the session."""

    def __instancecheck__(cls, item: Any) -> bool:
        return isinstance(item, torch._C.Generator)


def _sent(made: torch.Tensor, what: str) -> PretendTensor:
    _stats.sync(f"{what} on the device")
    _stats.kernels += 1
    return PretendTensor(made.detach(), made.requires_grad)


def _inner(item: Any) -> Any:
    return item.inner if isinstance(item, PretendTensor) else item


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def _lists_as_tensors(index: Any) -> Any:
    if isinstance(index, list):
        return torch.tensor(index)
    if isinstance(index, tuple):
        return tuple(torch.tensor(item) if isinstance(item, list) else item for item in index)
    return index


def _line() -> str:
    """The innermost line of our package or of a host library; else the innermost outside torch."""
    frame, fallback = sys._getframe(1), ""
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if name != __file__:
            for package in ("tokencredit", "trl", "transformers"):
                if f"/{package}/" in name:
                    return f"{package}/{name.rsplit(f'/{package}/', 1)[1]}:{line}"
            if not fallback and "/torch/" not in name:
                fallback = f"{Path(name).name}:{line}"
        frame = frame.f_back
    return fallback


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled guard, built once for each source and build of torch and kept in the temporary folder."""
    torch_folder = Path(torch.__file__).parent
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + torch.__version__.encode() + str(torch_folder).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tokencredit-fakecuda-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"guard-{key}.so"
    with FileLock(folder / "lock"):
        if not path.is_file():
            unfinished = path.with_suffix(".unfinished")
            command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(SOURCE)]
            command += [f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(unfinished)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                raise RuntimeError(f"the guard of the pretend device does not compile:\n{built.stderr}")
            unfinished.replace(path)
    return ctypes.CDLL(str(path))

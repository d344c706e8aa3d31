"""Kernel launches that cost the host little.

``@kernel`` is ``@triton.jit`` for the kernels that Python launches. Triton binds, describes and
looks up the arguments of every launch anew and calls its hooks, which takes more than twice what is
done here, and a prompt's step is hundreds of launches. The first launch of a kind goes
through Triton, which compiles; the compiled kernel is then remembered and started directly.

Launches are of one kind where Triton would run the same binary for them. A kind is made of the
device, the launch options, the types of all arguments, and

    tensors             their dtype and whether their data starts at a multiple of 16 bytes
    tensor descriptors  their dtype and the shape of their blocks
    constexprs          their value
    other integers      their value (finer than Triton, which asks for 1 and for multiples of 16),
                        or with ``do_not_specialize`` whether they fit 32 bits

All else goes through Triton each time: devices that are not CUDA, types not named here, kernels
that somebody watches (Triton's launch hooks, its profiler, a replaced ``JITFunction.run``), and
versions of Triton whose insides were not read for this. Two things are settled by the first launch:
Triton's environment variables and knobs, and the module constants that a kernel uses.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from squall.kernels.lang import HAS_TRITON, TensorDescriptor, triton

Start = Callable[..., None]  # takes three sizes of the grid, the stream, and a tuple of arguments

_TENSORS = (Tensor, torch.nn.Parameter)
_VARIABLES = (float, TensorDescriptor, *_TENSORS)
# Equal values of these are the same constant, which is not so of floats (0.0 and -0.0).
_CONSTANTS = (int, bool, str, type(None), torch.dtype)
_ONES = ((), (1, 1), (1,), ())  # what a grid of this many sizes lacks


def current_device_of(module: Any) -> Callable[[], int]:
    """``module.current_device`` (of ``torch.cuda`` or ``torch.xpu``) for callers who know that the
    device was initialised, because there is a tensor on it: without the check for that."""
    name = module.__name__.rpartition(".")[2]
    known: Callable[[], int] = getattr(torch._C, f"_{name}_getDevice", module.current_device)
    return known


class _Insides:
    """All that is used of Triton beyond what it documents, as read in 3.6 and 3.7."""

    VERSIONS = ("3.6.", "3.7.")

    def __init__(self) -> None:
        from triton import knobs
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.jit_function = JITFunction
        # None where it was replaced before this file was imported
        own = JITFunction.run.__module__ == JITFunction.__module__
        self._run = JITFunction.run if own else None
        self._compiled_kernel = CompiledKernel
        self._driver = driver
        self._runtime = knobs.runtime
        self._hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        self._enter_calls, self._exit_calls = (hook.calls for hook in self._hooks)
        self._cuda_device = current_device_of(torch.cuda)
        self._spreads_arguments = triton.__version__.startswith("3.6.")

    def place(self) -> tuple[int, int] | None:
        """The current device and its stream; None where somebody wants to know of launches."""
        enter, leave = self._hooks
        runtime = self._runtime
        if (
            self.jit_function.run is not self._run
            or runtime.launch_enter_hook is not enter
            or runtime.launch_exit_hook is not leave
            or self._enter_calls
            or self._exit_calls
        ):
            return None
        active = self._driver.active
        current = active.get_current_device
        device = self._cuda_device() if current is torch.cuda.current_device else current()
        return device, active.get_current_stream(device)

    def start_of(self, launched: object) -> Start | None:
        """How to start what ``JITFunction.run`` launched; None for kernels that are not CUDA's."""
        if not isinstance(launched, self._compiled_kernel):
            return None
        if launched.metadata.target.backend != "cuda":
            return None
        from triton.backends.nvidia.driver import CudaLauncher

        run, function, metadata = launched.run, launched.function, launched.packed_metadata
        if type(run) is CudaLauncher and not run.global_scratch_size + run.profile_scratch_size:
            return self.direct_start(run, function, metadata)

        def start(x: int, y: int, z: int, stream: int, args: tuple[Any, ...]) -> None:
            run(x, y, z, stream, function, metadata, None, None, None, *args)

        return start

    def direct_start(self, run: Any, function: int, metadata: Any) -> Start:
        """What a ``CudaLauncher`` does for a kernel without scratch memory and hooks."""
        launch = run.launch
        flags = run.launch_cooperative_grid, run.launch_pdl
        middle: tuple[Any, ...]
        if self._spreads_arguments:
            middle = function, *flags, None, None, metadata, None, None, None

            def start(x: int, y: int, z: int, stream: int, args: tuple[Any, ...]) -> None:
                launch(x, y, z, stream, *middle, *args)

        else:
            signature = run.arg_annotations, run.kernel_signature
            middle = function, *flags, metadata, None, None, None, None, None, *signature

            def start(x: int, y: int, z: int, stream: int, args: tuple[Any, ...]) -> None:
                launch(x, y, z, stream, *middle, args)

        return start


_INSIDES = _Insides() if HAS_TRITON and triton.__version__.startswith(_Insides.VERSIONS) else None


def kernel(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorate a kernel as ``triton.jit`` does, with its options, to be launched as
    ``name[grid](*arguments, **launch_options)``; ``grid`` is a tuple of one to three ints.

    A kernel that other kernels call stays ``@triton.jit``.
    """
    if fn is None:
        return functools.partial(kernel, **options)
    jitted = triton.jit(fn, **options)
    if _INSIDES is None or not isinstance(jitted, _INSIDES.jit_function):
        return jitted  # no Triton, one that is not known here, or the interpreter
    return Kernel(jitted, _INSIDES)


class _Plan:
    """How launches whose arguments have certain types are told apart, and those seen so far."""

    def __init__(self, params: Sequence[Any], types: tuple[type, ...]) -> None:
        tensors, descriptors, counts, values = [], [], [], []
        for i, (param, kind) in enumerate(zip(params, types, strict=True)):
            if kind in _TENSORS:
                tensors.append(i)
            elif kind is TensorDescriptor:
                descriptors.append(i)
            elif kind is int and param.do_not_specialize and not param.is_constexpr:
                counts.append(i)
            elif kind is not float:  # a float's value makes no difference
                values.append(i)
        self.tensors, self.values = _picker(tensors), _picker(values)
        self.descriptors = _picker(descriptors) if descriptors else None
        self.counts = _picker(counts) if counts else None
        self.starts: dict[tuple[Any, ...], Start] = {}

    @staticmethod
    def possible(params: Sequence[Any], types: tuple[type, ...]) -> bool:
        """Whether all that Triton looks at is known for arguments of these types."""
        return all(
            kind in _CONSTANTS or (not p.is_constexpr and kind in _VARIABLES)
            for p, kind in zip(params, types, strict=True)
        )


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the arguments at some places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


class Kernel:
    """A kernel to be launched; ``jitted`` is Triton's own object."""

    def __init__(self, jitted: Any, insides: _Insides) -> None:
        self.jitted = jitted
        self._insides = insides
        self._pre_run_hooks = jitted.pre_run_hooks
        self._plans: dict[tuple[type, ...], _Plan] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(
        self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        plan = self._plans.get(tuple(map(type, args)))
        if plan is None:
            args, options = self._in_order(args, options)
            plan = self._plan(tuple(map(type, args)))
        place = self._insides.place()
        if plan is None or place is None or self._pre_run_hooks:
            self.jitted.run(*args, grid=grid, warmup=False, **options)
            return
        device, stream = place
        kind: list[Any] = [device]
        addresses = 0
        for tensor in plan.tensors(args):
            kind.append(tensor.dtype)
            addresses |= tensor.data_ptr()
        if addresses % 16:
            kind += [tensor.data_ptr() % 16 == 0 for tensor in plan.tensors(args)]
        if plan.descriptors is not None:
            for descriptor in plan.descriptors(args):
                kind += (descriptor.base.dtype, tuple(descriptor.block_shape))
        if plan.counts is not None:
            kind += [count >> 31 for count in plan.counts(args)]  # 0 or -1 where 32 bits are enough
        key = (*kind, *plan.values(args), *options.items())
        start = plan.starts.get(key)
        if start is not None:
            start(*grid, *_ONES[len(grid)], stream, args)
            return
        start = self._insides.start_of(self.jitted.run(*args, grid=grid, warmup=False, **options))
        if start is not None:
            plan.starts[key] = start

    def _in_order(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments by position, and the launch options."""
        names = self.jitted.arg_names
        if len(args) == len(names):
            return args, options
        named = {name: value for name, value in options.items() if name in names}
        bound = self.jitted.signature.bind(*args, **named)
        bound.apply_defaults()
        return bound.args, {name: options[name] for name in options if name not in named}

    def _plan(self, types: tuple[type, ...]) -> _Plan | None:
        """The plan for arguments of these types; None where Triton may look at more than we do."""
        if types not in self._plans and _Plan.possible(self.jitted.params, types):
            self._plans[types] = _Plan(self.jitted.params, types)
        return self._plans.get(types)

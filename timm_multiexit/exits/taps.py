"""Taps: the only code that registers or answers forward hooks."""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map

from timm_multiexit.exits.layouts import main_logits
from timm_multiexit.exits.stepping import Stepper
from timm_multiexit.utils.errors import StateError, one_line

# (exit, tensor at its tap) -> logits [N, C]
RunHead = Callable[[int, Tensor], Tensor]

# (tap index, tensor) -> the places [N'] of the samples that stay in the batch, None for all of them
Visitor = Callable[[int, Tensor], Tensor | None]

_install_lock = threading.Lock()  # of all models together: a lock of its own would keep a model from being pickled


class ForwardStopped(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a visitor to leave the backbone's forward; `Taps.visit` catches it."""


class _CallState(threading.local):
    """The visitor of the forward that runs in this thread, None outside of one.

    Per thread, so one model serves many threads. Copies and pickles start empty: a call in flight belongs to the
    model it was made on.
    """

    def __init__(self) -> None:
        # In the instance, not the class: torch.compile guards on the attribute being there.
        self.visitor: Visitor | None = None

    def __reduce__(self) -> tuple[type['_CallState'], tuple[()]]:
        return _CallState, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> '_CallState':
        return _CallState()


class _Pauses:
    """The visitor of `Taps.step`."""

    def __init__(self, taps: 'Taps', read: Callable[[int, Tensor], Any], pause: Callable[[Any], None]):
        self._taps, self._read, self._pause = taps, read, pause

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot wait; compiled parts end here
    def visit(self, idx: int, tensor: Tensor) -> None:
        if idx < len(self._taps.names):
            self._pause(self._read(idx, tensor))
            self._taps._state.visitor = self.visit


class Taps:
    """Forward hooks at named modules of a backbone, silent unless a visitor is at work.

    The hooks are partials of this object's methods, and this object knows names and call state alone: a copy of the
    backbone takes its taps along and nothing else, and copies and pickles answer to themselves.

    Args:
        names: Names of the tapped modules, shallow to deep; tap k's tensor is the module's output.
        classifiers: Names of the backbone's linear classifiers, one as a rule. What enters them is visited under the
            indices from `len(names)` on.
        outputs: Which output to read of each module where it has several; None for all of them, as they come.
    """

    def __init__(self, names: Sequence[str], classifiers: Sequence[str], outputs: Sequence[int | None] | None = None):
        self.names = tuple(names)
        self.classifiers = tuple(classifiers)
        self.outputs = tuple(outputs) if outputs is not None else (0,) * len(self.names)
        self._state = _CallState()

    def install(self, backbone: nn.Module) -> None:
        """Put hooks where they are missing: at first, and where a module was replaced since (sync-BN, freezing)."""
        try:
            modules = [backbone.get_submodule(name) for name in (*self.names, *self.classifiers)]
        except AttributeError as error:
            raise StateError(
                f'{type(backbone).__name__} has changed since its exits were attached: {one_line(error)}. Attach them'
                ' anew.'
            ) from error
        for idx, module in enumerate(modules):
            if self._is_hooked(module, idx):
                continue
            # Two threads that both find it missing would hook it twice, and count an exit twice from then on.
            with _install_lock:
                if self._is_hooked(module, idx):
                    continue
                if idx < len(self.names):
                    module.register_forward_hook(partial(self._on_output, idx))
                else:
                    module.register_forward_pre_hook(partial(self._on_input, idx))

    def remove(self, backbone: nn.Module) -> None:
        """Take the hooks away again."""
        for module in backbone.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if self._is_own(hook)]:
                    del hooks[key]

    def visit(self, backbone: nn.Module, x: Tensor, visitor: Visitor) -> Tensor | None:
        """Run the backbone with a visitor at its taps.

        Args:
            backbone: The module that `install` was called on, or a copy of it.
            x: Input batch, [B, C, H, W].
            visitor: Called with (tap index, tensor) as each tensor arrives. It may return the places of the samples
                that stay, and the others leave the batch; it may raise `ForwardStopped`.

        Returns:
            Main's logits, None if the visitor stopped the forward.
        """
        return cast(Tensor | None, main_logits(backbone, self._run(backbone, x, visitor)))

    def _run(self, backbone: nn.Module, x: Tensor, visitor: Visitor) -> Any:
        """Do `visit`, and return all that the backbone gives."""
        self.install(backbone)
        outer = self._state.visitor
        self._state.visitor = visitor
        try:
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
                with _kept_module_stack():
                    return backbone(x)
            return backbone(x)
        except ForwardStopped:
            return None
        finally:
            self._state.visitor = outer

    def collect(self, backbone: nn.Module, x: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
        """Run the backbone and keep what passes its taps.

        Returns:
            The backbone's output, a tuple where it gives several; one tensor per tap, in declared order; and what
            entered the classifiers.

        Raises:
            RuntimeError: A tap did not fire, or none of the classifiers.
            StateError: The next layer changes in place what a tap gives, as dropout may do in training alone.
        """
        num_taps = len(self.names)
        tensors: list[Tensor | None] = [None] * (num_taps + len(self.classifiers))
        versions: list[int | None] = [None] * len(tensors)

        def keep(idx: int, tensor: Tensor) -> None:
            tensors[idx], versions[idx] = tensor, _version(tensor)

        output = self._run(backbone, x, keep)
        for name, tensor, version in zip(self.names, tensors, versions):
            if tensor is None:
                raise RuntimeError(_silent_message(name))
            if version is not None and version != _version(tensor):
                raise StateError(f"The layer after the tap '{name}' changes its output in place, tap that one.")
        entering = [tensor for tensor in tensors[num_taps:] if tensor is not None]
        if not entering and all(isinstance(backbone.get_submodule(name), nn.Identity) for name in self.classifiers):
            entering = [output]  # without classes some backbones skip their classifiers and return the features
        if not entering:
            raise RuntimeError(_silent_message(', '.join(self.classifiers)))
        return output, cast(list[Tensor], tensors[:num_taps]), entering

    def stop(self, backbone: nn.Module, x: Tensor, idx: int) -> Tensor:
        """Run the backbone up to tap `idx`, nothing after it, and return the tensor that arrived there.

        Raises:
            RuntimeError: The tap did not fire.
        """
        tensors: list[Tensor] = []

        def stop(at: int, tensor: Tensor) -> None:
            if at == idx:
                tensors.append(tensor)
                raise ForwardStopped

        self.visit(backbone, x, stop)
        if not tensors:
            raise RuntimeError(_silent_message(self.names[idx]))
        return tensors[0]

    def step(self, backbone: nn.Module, x: Tensor, read: Callable[[int, Tensor], Any]) -> Generator[Any, None, Any]:
        """Yield what `read` makes of the tensor at each tap, in the order of arrival; the forward waits meanwhile.

        While it waits the model is as outside of a forward. Closing the iterator ends the forward. It runs without
        gradients: what gradient checkpointing sets up would be in force for the caller while it waits.

        Backbone and input are as for `visit`; `read` is called with (tap index, tensor). The generator returns the
        backbone's output.
        """

        @torch.no_grad()
        def forward(pause: Callable[[Any], None]) -> Tensor | None:
            return self.visit(backbone, x, _Pauses(self, read, pause).visit)

        stepper = Stepper(forward, x.device)
        try:
            while True:
                outer = self._state.visitor
                try:
                    is_done, value = stepper.resume()
                finally:
                    self._state.visitor = outer
                if is_done:
                    return value
                yield value
        finally:
            outer = self._state.visitor
            stepper.stop(ForwardStopped())
            self._state.visitor = outer

    def _on_output(self, idx: int, module: nn.Module, args: Any, output: Any) -> Any:
        visitor = self._state.visitor
        if visitor is None:
            return None
        which = self.outputs[idx]
        tensor = output[which] if which is not None and isinstance(output, (tuple, list)) else output
        rows = visitor(idx, tensor)
        return None if rows is None else _select_samples(output, rows, len(tensor))

    def _on_input(self, idx: int, module: nn.Module, args: Any) -> Any:
        visitor = self._state.visitor
        # Nothing is read of a module that gets its input by keyword.
        rows = None if visitor is None or not args else visitor(idx, args[0])
        return None if rows is None else _select_samples(args, rows, len(args[0]))

    def _is_hooked(self, module: nn.Module, idx: int) -> bool:
        hooks: Mapping[int, Any] = module._forward_hooks if idx < len(self.names) else module._forward_pre_hooks
        # A list, since another thread may add a hook meanwhile.
        return any(self._is_own(hook) and hook.args == (idx,) for hook in list(hooks.values()))

    def _is_own(self, hook: Any) -> bool:
        # Told by owner, not by the method itself: torch.compile cannot compare bound methods.
        return isinstance(hook, partial) and getattr(hook.func, '__self__', None) is self


def _select_samples(output: Any, rows: Tensor, num_samples: int) -> Any:
    """Return a module's output with some of its samples.

    Raises:
        ValueError: It holds a tensor of several rows that are not those of the samples. In a batch of as many samples
            it could not be told apart, so samples must not leave there (`find_leaving`).
    """

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if len(value) == num_samples:
            # Indexing keeps channels_last and is several times faster than index_select (torch 2.15, CPU).
            return value[rows]
        if len(value) == 1:  # for all samples alike
            return value
        raise ValueError(f'Samples cannot be selected of {list(value.shape)}, got {num_samples} samples.')

    return tree_map(select, output)


@contextmanager
def _kept_module_stack() -> Iterator[None]:
    """Keep the tracer of `torch.export.export` right about which modules are being called.

    It notes that a module has returned, but not that an exception has left it, and then gives up (torch 2.15).
    """
    stack = getattr(getattr(get_proxy_mode(), 'tracer', None), 'module_stack', {})
    callers = set(stack)
    try:
        yield
    finally:
        for key in [key for key in stack if key not in callers]:
            del stack[key]


def _version(tensor: Any) -> int | None:
    """Return how often a tensor was changed in place, None where that is not known."""
    is_traced = torch.compiler.is_compiling() or get_proxy_mode() is not None
    return None if is_traced or not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def _silent_message(name: str) -> str:
    return f"Tap '{name}' did not fire: the backbone's forward does not call this module, tap another one."


def resolve_tap(backbone: nn.Module, name: str) -> str:
    """Return the module to hook for a stage: the stage, or its last child as long as that is what the stage returns.

    With gradient checkpointing timm runs the children of a plain `nn.Sequential` one by one and never calls the
    container, so that a hook on it stays silent; a `ModuleList` is never called. A subclass with a forward of its own
    is called, and kept; so is one whose last child is in several places (an activation that all blocks share).
    """
    module: Any = backbone.get_submodule(name)
    counts = Counter(id(child) for _, child in backbone.named_modules(remove_duplicate=False))
    while (type(module).forward is nn.Sequential.forward or isinstance(module, nn.ModuleList)) and len(module):
        # Not `named_children`, which leaves out a child that it has met.
        child, last = [item for item in module._modules.items() if item[1] is not None][-1]
        if counts[id(last)] > counts[id(module)] and not isinstance(module, nn.ModuleList):
            break
        name, module = f'{name}.{child}', last
    return name

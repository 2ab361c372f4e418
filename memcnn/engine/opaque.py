"""Record a module that offers only ``forward`` and ``inverse`` as one step; backward calls both."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from memcnn.engine.arguments import Arguments, refuse_inference
from memcnn.engine.chain import Value, dense, evaluation_lock, rebuild_from, tag, value_of_whole
from memcnn.engine.recompute import Recomputation
from memcnn.engine.rounding import relative_error
from memcnn.engine.second import SecondEvaluation

_STREAM = object()


def call_opaque(
    run: Callable,
    undo: Callable,
    module: nn.Module,
    inputs: Sequence,
    kwargs: dict,
    *,
    log_det: bool = False,
    keep_input: bool = False,
    **options: Any,
) -> Any:
    """Return ``run(*inputs, **kwargs)``, recorded as one step, where ``undo(*outputs, **kwargs)`` returns the inputs.

    Streams, that is floating-point and complex tensors among the positional inputs, are rebuilt. Other arguments are
    stored. If ``run`` returns fewer values than it takes, ``undo`` also receives the inputs that are no streams.

    Args:
        run: the forward or the inverse of ``module``.
        undo: the other of the two.
        module: the block.
        inputs: positional arguments of ``run``.
        kwargs: keyword arguments of both.
        log_det: ``run`` returns (outputs, log_det), and ``undo`` takes only the outputs.
        keep_input: store the inputs, so that nothing needs to be inverted.
        **options: see ``Recomputation``.
    """
    for x in inputs:
        if isinstance(x, Tensor):
            refuse_inference(x, f"an input of {type(module).__name__}")
    # with keep_input each input gets a new value, whose tensor no other block drops
    values = [Value(x) if keep_input else value_of_whole(x) or Value(x) for x in inputs if is_stream(x)]
    inputs = [dense(x) if is_stream(x) else x for x in inputs]
    with evaluation_lock:
        step = OpaqueModule(run, undo, module, inputs, kwargs, values, log_det, options | {"keep_input": keep_input})
        result = step.evaluate(run, *inputs, **kwargs)
    step.finish(result)
    return result


def is_stream(x: object) -> bool:
    """Return whether x is a tensor that a block rebuilds."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


class OpaqueModule(Recomputation):
    """The step result = run(*inputs, **kwargs), undone by inputs = undo(*result, **kwargs)."""

    def __init__(
        self,
        run: Callable,
        undo: Callable,
        module: nn.Module,
        inputs: Sequence,
        kwargs: dict,
        targets: Sequence[Value],
        log_det: bool,
        options: dict,
    ):
        self.run, self.undo, self.log_det = run, undo, log_det
        self.positions = [i for i, x in enumerate(inputs) if is_stream(x)]
        self.arguments = Arguments(
            type(module).__name__, [None if i in self.positions else x for i, x in enumerate(inputs)], kwargs
        )
        self.has_arguments = bool(kwargs) or len(self.positions) < len(inputs)
        streams = [inputs[i] for i in self.positions]
        self.kinds = [(x.dtype, tuple(x.shape)) for x in streams]
        super().__init__(module, streams, targets, **options)
        self.results: list = []
        """The outputs of the forward evaluation, with ``_STREAM`` in place of each stream. ``undo`` needs the rest."""

    def finish(self, result: object) -> None:
        """End the forward evaluation: make values for the streams in ``result``, and complete the step."""
        outputs = self._outputs(result)
        streams = [y for y in outputs if is_stream(y)]
        if not streams:
            raise TypeError(
                f"{self.name} must return a floating-point tensor, or a tuple with some, since its inverse "
                f"computes the input from them: got {type(result).__name__}"
            )
        # the graph refers to this step, which must not refer to the graph
        self.results = [_STREAM if is_stream(y) else tree_map_only(Tensor, Tensor.detach, y) for y in outputs]
        if not self.kept and self.has_arguments:
            self._check_signature(streams)
        values = [Value(y) for y in streams]
        for y, value in zip(streams, values, strict=True):
            rebuild_from(value, y)
            tag(y, [value], None)
        self.complete(values)

    def recompute(self, second: SecondEvaluation) -> Sequence[Tensor]:
        arguments, kwargs = self.arguments.read()
        tensors = [value.read() for value in self.kept] or self._inverted(arguments, kwargs)
        draws = bool(self.replay.generators) and not self.kept
        if second.is_wanted or draws:
            leaves = [self.as_recorded(i, tensor) for i, tensor in enumerate(tensors)]
            arguments, kwargs = self.arguments.read()  # once more: the inverse may have changed a list among them
            for position, leaf in zip(self.positions, leaves, strict=True):
                arguments[position] = leaf
            with self.replay.again():
                result = second.run(leaves, self.run, *arguments, **kwargs)
            if draws:
                self._check_draws(result)
        return tensors

    def _outputs(self, result: Any) -> list:
        """Return the outputs in what ``run`` returned, without a log-determinant, as a list."""
        return _as_list(result[0] if self.log_det else result)

    def _check_draws(self, result: Any) -> None:
        """Raise a RuntimeError if outputs computed again from rebuilt inputs are further off than rounding explains.

        Then the inverse used the random numbers of the forward pass in another order, or autocast's rounding is large.
        """
        error = self._excess(result, self._autocast_dtype)
        if not error:
            return
        if self._autocast_dtype is not None and self._is_right_without_autocast():
            raise RuntimeError(
                f"under autocast the inverse of {self.name} does not undo its forward pass, and without autocast it "
                f"does: outputs computed again are {error:.1e} off, relative to the largest entry; compute scales and "
                "shifts in float32 (.float()), disable autocast within the block, or use keep_input=True"
            )
        raise RuntimeError(
            f"{self.name} draws random numbers (dropout), and its inverse does not undo its forward pass "
            "with the same numbers: let both draw them in the same order, use keep_input=True, or "
            "build the block from a coupling, such as AdditiveCoupling, whose branches may draw"
        )

    @property
    def _device_type(self) -> str:
        """The type of the streams' device."""
        return self.sources[0].read().device.type

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast in the forward pass; None where it was off."""
        states = self.replay.autocast
        return next((dtype for kind, dtype, enabled, _ in states if enabled and kind == self._device_type), None)

    def _excess(self, result: Any, autocast_dtype: torch.dtype | None) -> float:
        """Return the largest relative error in ``result``, outputs computed again, that rounding does not explain.

        It is 0 if rounding to the streams' dtypes or to ``autocast_dtype`` explains all errors. NaN is ignored here,
        because the user sees it in the loss.
        """
        streams = [y for y in self._outputs(result) if is_stream(y)]
        found = [0.0]
        for got, value in zip(streams, self.sources, strict=True):
            error = relative_error(got, expected := value.read())
            if (
                error
                > max(torch.finfo(dtype).eps for dtype in (expected.dtype, autocast_dtype or expected.dtype)) ** 0.5
            ):
                found.append(error)
        return max(found)

    def _is_right_without_autocast(self) -> bool:
        """Return whether forward undoes the inverse, with the same random numbers, where autocast is off."""
        try:
            arguments, kwargs = self.arguments.read()
            tensors = self._inverted(arguments, kwargs, autocast=False)
            arguments, kwargs = self.arguments.read()
            for position, tensor in zip(self.positions, tensors, strict=True):
                arguments[position] = tensor
            with (
                self.replay.again(check_generators=False),
                torch.autocast(self._device_type, enabled=False),
                torch.no_grad(),
            ):
                return not self._excess(self.run(*arguments, **kwargs), None)
        except Exception:  # such as one for dtypes that do not fit each other without autocast
            return False

    def _arguments_of_undo(self, streams: Sequence[Tensor], arguments: Sequence) -> list:
        """Return the positional arguments of ``undo``: the outputs and, if they are too few, what is no stream."""
        following = iter(streams)
        outputs = [next(following) if y is _STREAM else y for y in self.results]
        if len(outputs) < len(arguments):
            outputs += [x for i, x in enumerate(arguments) if i not in self.positions]
        return outputs

    def _check_signature(self, streams: Sequence[Tensor]) -> None:
        """Raise a TypeError in the forward pass if ``undo`` cannot be called with what it will be given."""
        arguments, kwargs = self.arguments.read()
        given = self._arguments_of_undo(streams, arguments)
        try:
            inspect.signature(self.undo).bind(*given, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the inverse of {self.name} cannot be called with the outputs and the stored arguments of forward "
                f"({len(given)} positional, keywords {sorted(kwargs)}): {error}. Give inverse the parameters of "
                "forward, or use keep_input=True"
            ) from error
        except ValueError:  # a function without a signature
            pass

    def _inverted(
        self, arguments: Sequence, kwargs: Mapping[str, object], *, autocast: bool = True
    ) -> Sequence[Tensor]:
        """Return the streams among the inputs, computed by ``undo`` from the outputs; without autocast if asked."""
        outputs = self._arguments_of_undo([value.read() for value in self.sources], arguments)
        off = nullcontext() if autocast else torch.autocast(self._device_type, enabled=False)
        with self.replay.again(check_generators=False), off, torch.no_grad():
            inputs = _as_list(self.undo(*outputs, **kwargs))
        if len(inputs) == len(arguments):
            inputs = [inputs[i] for i in self.positions]
        kinds = [(x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        if kinds != self.kinds:
            raise self._kinds_error(kinds)
        return inputs

    def _kinds_error(self, kinds: Sequence) -> RuntimeError:
        """Return the exception for an inverse whose results have other dtypes or shapes than the inputs."""
        lower = self._autocast_dtype
        shapes = [kind[1] for kind in kinds if isinstance(kind, tuple)]
        if lower in [kind[0] for kind in kinds] and shapes == [shape for _, shape in self.kinds]:
            wanted = ", ".join(dict.fromkeys(str(dtype) for dtype, _ in self.kinds))
            return RuntimeError(
                f"under autocast the inverse of {self.name} returned {lower} where forward was given {wanted}: "
                "let the inverse return tensors of the inputs' dtype, as with x.to(y.dtype) for an output y of that "
                "dtype, disable autocast within the block, or use keep_input=True"
            )
        return RuntimeError(
            f"the inverse of {self.name} must return what forward was given, {self.kinds}, and returned {kinds}: "
            "return tensors of the shapes and dtypes of the inputs, in their order"
        )


def _as_list(values: object) -> list:
    return list(values) if isinstance(values, (tuple, list)) else [values]

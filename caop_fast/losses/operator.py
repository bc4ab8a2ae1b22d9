"""PyTorch operators with typed arguments: NamedTuples in, a NamedTuple out.

``torch.library`` operators take flat lists of tensors and scalars. ``Operator`` derives the flat schema from the
annotations of two NamedTuples, and hands the NamedTuples themselves to the implementation, its fake, and the backward.
They exist so that ``torch.compile`` takes a loss as a whole: implementations may look at data and loop over blocks.

Annotations and what they become in the schema (nested NamedTuples are flattened, their names joined by ``_``):

    Tensor, Tensor | None             Tensor, Tensor?
    float | Tensor                    a float, and a ``Tensor?`` that replaces it
    float, int, bool, str (| None)    the same
    torch.dtype                       ScalarType
    tuple[int, ...], tuple[bool, ...] int[], bool[]

An operator cannot return None: a field that is None travels as an empty tensor of ``_NONE_RANK`` axes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "caop_fast"
_NONE_RANK = 5
_SCALARS = {
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[int, ...]: "int[]",
    tuple[bool, ...]: "bool[]",
}

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs")


class TensorInfo(NamedTuple):
    """What a backward knows of an input tensor that was not saved."""

    shape: torch.Size
    dtype: torch.dtype


class _Leaf(NamedTuple):
    """One field of a nested NamedTuple."""

    name: str
    path: tuple[int, ...]
    schema: str  # the type of its argument
    is_union: bool  # float | Tensor: a second argument, ``Tensor?``, follows


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _schema_type(annotation: Any) -> tuple[str, bool]:
    """The schema type of an annotation, and whether it is ``float | Tensor``."""
    options = set(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else {annotation}
    if options == {float, Tensor}:
        return "float", True
    optional = "?" if type(None) in options else ""
    options -= {type(None)}
    if len(options) == 1:
        (only,) = options
        if only is Tensor:
            return f"Tensor{optional}", False
        if only in _SCALARS:
            return _SCALARS[only] + optional, False
    raise TypeError(f"an operator cannot take {annotation}")


def _leaves(record: type, prefix: str = "", path: tuple[int, ...] = ()) -> Iterator[_Leaf]:
    hints = get_type_hints(record)
    for index, name in enumerate(record._fields):  # type: ignore[attr-defined]  # a NamedTuple
        annotation = hints[name]
        if _is_record(annotation):
            yield from _leaves(annotation, f"{prefix}{name}_", (*path, index))
        else:
            yield _Leaf(f"{prefix}{name}", (*path, index), *_schema_type(annotation))


class _Plan(NamedTuple):
    """How a NamedTuple is put together from a flat list: for each field a plan, or whether it is ``float | Tensor``."""

    record: type
    fields: tuple[Any, ...]

    def build(self, flat: Iterator[Any]) -> Any:
        values: list[Any] = []
        for field in self.fields:
            if isinstance(field, _Plan):
                values.append(field.build(flat))
                continue
            value = next(flat)
            if field:
                per_row = next(flat)
                value = value if per_row is None else per_row
            values.append(tuple(value) if isinstance(value, list) else value)
        return self.record(*values)


def _plan(record: type) -> _Plan:
    hints = get_type_hints(record).values()
    return _Plan(record, tuple(_plan(hint) if _is_record(hint) else _schema_type(hint)[1] for hint in hints))


class _Record(Generic[Inputs]):
    """A nested NamedTuple as a flat list of arguments, and back."""

    def __init__(self, record: type[Inputs]) -> None:
        self.type = record
        self.plan = _plan(record)
        self.leaves = tuple(_leaves(record))
        self.paths = tuple((leaf.path, leaf.is_union) for leaf in self.leaves)
        names = [leaf.name for leaf in self.leaves]
        if len(set(names)) < len(names):
            raise TypeError(f"{record.__name__} has fields of one name when flattened: {names}")

    def flatten(self, value: Inputs) -> list[Any]:
        flat: list[Any] = []
        for path, is_union in self.paths:
            item: Any = value
            for index in path:
                item = item[index]
            if is_union:
                per_row = isinstance(item, Tensor)
                flat.append(0.0 if per_row else item)
                flat.append(item if per_row else None)
            else:
                flat.append(item)
        return flat

    def unflatten(self, flat: Sequence[Any]) -> Inputs:
        return self.plan.build(iter(flat))

    def schema(self, mutates: Sequence[str]) -> str:
        arguments = []
        for leaf in self.leaves:
            kind = leaf.schema
            if leaf.name in mutates:
                kind = kind.replace("Tensor", f"Tensor(a{mutates.index(leaf.name)}!)")
            arguments.append(f"{kind} {leaf.name}")
            if leaf.is_union:
                arguments.append(f"Tensor? {leaf.name}_rows")
        return ", ".join(arguments)

    def position(self, name: str) -> int:
        """Where the argument ``name`` stands in the flat list."""
        position = 0
        for leaf in self.leaves:
            if leaf.name == name:
                return position
            position += 2 if leaf.is_union else 1
        raise KeyError(f"{self.type.__name__} has no argument {name!r}")


class Operator(Generic[Inputs, Outputs]):
    """``torch.ops.caop_fast.<name>``, called with a NamedTuple and returning a NamedTuple (a Tensor, or nothing).

    Args:
        name: of the operator.
        inputs: NamedTuple type of its arguments, maybe nested.
        outputs: NamedTuple type of its results, each ``Tensor`` or ``Tensor | None``; or ``Tensor``; or ``NoneType``.
        run: the implementation, from inputs to outputs. No output may be, or share memory with, an input.
        fake: the same without data, for tracing.
        mutates: flattened names of the input tensors that ``run`` writes to.
        once: the message of the RuntimeError when the operator is differentiated; None where it never needs to be, or
            has ``register_autograd``.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        outputs: type[Outputs],
        run: Callable[[Inputs], Outputs],
        fake: Callable[[Inputs], Outputs],
        *,
        mutates: Sequence[str] = (),
        once: str | None = None,
    ) -> None:
        self.name = name
        self._inputs = _Record(inputs)
        self._outputs = outputs
        fields = getattr(outputs, "_fields", None)
        self._fields: tuple[str, ...] | None = fields
        count = 0 if outputs is type(None) else 1 if fields is None else len(fields)
        returns = "Tensor" if fields is None and count else f"({', '.join(['Tensor'] * count)})"
        self.op = torch.library.custom_op(
            f"{NAMESPACE}::{name}",
            lambda *flat: self._pack(run(self._inputs.unflatten(flat))),
            mutates_args=tuple(mutates),
            schema=f"({self._inputs.schema(mutates)}) -> {returns}",
        )
        self.op.register_fake(lambda *flat: self._pack(fake(self._inputs.unflatten(flat))))
        if once is not None:

            def twice(ctx: Any, *_: Any) -> None:
                raise RuntimeError(once)

            self.op.register_autograd(twice)

    def __call__(self, inputs: Inputs) -> Outputs:
        return self._unpack(self.op(*self.flatten(inputs)))

    def flatten(self, inputs: Inputs) -> list[Any]:
        """The arguments of ``op``, for ``torch.library.opcheck``."""
        return self._inputs.flatten(inputs)

    def _pack(self, outputs: Any) -> Any:
        if self._fields is None:
            return outputs
        like = next(tensor for tensor in outputs if tensor is not None)
        return tuple(like.new_empty((0,) * _NONE_RANK) if tensor is None else tensor for tensor in outputs)

    def _unpack(self, flat: Any) -> Any:
        if self._fields is None:
            return flat
        return self._outputs(*[None if tensor.ndim == _NONE_RANK else tensor for tensor in flat])

    def register_autograd(
        self,
        backward: Callable[[Inputs, Outputs, Outputs], Sequence[Tensor | None]],
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        saved: Sequence[str] = (),
        save_inputs: bool = True,
        overwrites: Overwrites[Inputs] | None = None,
    ) -> None:
        """Make the operator, which returns a NamedTuple, differentiable.

        Args:
            backward: from the inputs, the outputs ``saved`` (None in the other fields) and the upstream gradients (in
                the fields of the outputs; None where there is none) to the gradients of ``inputs``, in that order.
            inputs: flattened names of the differentiable inputs.
            outputs: names of the differentiable outputs.
            saved: names of the outputs that ``backward`` reads.
            save_inputs: whether input tensors are kept for ``backward``; else it gets a ``TensorInfo`` of each.
            overwrites: for a backward that may write its gradient over an input.
        """
        assert self._fields is not None, "only an operator that returns a NamedTuple has a derivative"
        fields, make = self._fields, self._outputs
        positions = [self._inputs.position(name) for name in inputs]
        differentiable = [name in outputs for name in fields]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            kept = [value if isinstance(value, Tensor) and save_inputs else None for value in inputs]
            ctx.rest = [
                (None if save_inputs else TensorInfo(value.shape, value.dtype)) if isinstance(value, Tensor) else value
                for value in inputs
            ]
            results = [t if name in saved else None for name, t in zip(fields, output, strict=True)]
            ctx.save_for_backward(*kept, *results)
            ctx.present = [t.ndim != _NONE_RANK for t in output]
            ctx.overwritten = False
            ctx.mark_non_differentiable(*(t for t, is_one in zip(output, differentiable, strict=True) if not is_one))
            ctx.set_materialize_grads(False)

        def run_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients: list[Tensor | None] = [None] * len(ctx.rest)
            if ctx.overwritten:
                assert overwrites is not None
                raise RuntimeError(
                    f"inplace=True: the first backward wrote its gradient over {overwrites.argument}; use inplace=False"
                )
            given = [
                gradient if is_one and present else None
                for gradient, is_one, present in zip(upstream, differentiable, ctx.present, strict=True)
            ]
            if all(gradient is None for gradient in given):
                return tuple(gradients)
            tensors = ctx.saved_tensors
            flat = [value if t is None else t for value, t in zip(ctx.rest, tensors, strict=False)]
            typed = self._inputs.unflatten(flat)
            if overwrites is not None and overwrites.asked(typed):
                if torch.is_grad_enabled():  # create_graph: the overwritten tensor would pass as a constant
                    raise RuntimeError(f"{overwrites.once}, and inplace=True takes no create_graph=True")
                ctx.overwritten = True
            results = [t if present else None for t, present in zip(tensors[len(flat) :], ctx.present, strict=True)]
            found = backward(typed, make(*results), make(*given))
            for position, gradient in zip(positions, found, strict=True):
                if ctx.needs_input_grad[position]:
                    gradients[position] = gradient
            return tuple(gradients)

        self.op.register_autograd(run_backward, setup_context=setup_context)


@dataclass(frozen=True)
class Overwrites(Generic[Inputs]):
    """A backward that writes its gradient over an input tensor, once, where that was asked for."""

    asked: Callable[[Inputs], bool]
    argument: str  # what the caller calls the tensor
    once: str  # the message for a derivative of the gradient


class GradientOperator(Generic[Inputs]):
    """The gradient of some logits, as two operators made from one function.

    ``caop_fast::<name>`` returns the gradient in a new tensor, ``caop_fast::<name>_`` writes it over the logits.

    Args:
        name: of the first operator.
        inputs: NamedTuple type of the arguments.
        run: from the inputs and where to write the gradient (the logits, or None for a new tensor) to the gradient,
            in the shape and dtype of the logits.
        logits: flattened name of the logits among the inputs.
        once: the message of the RuntimeError when the gradient is differentiated.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        run: Callable[[Inputs, Tensor | None], Tensor],
        *,
        logits: str,
        once: str,
    ) -> None:
        record = _Record(inputs)
        path = next(leaf.path for leaf in record.leaves if leaf.name == logits)

        def find(value: Any) -> Tensor:
            for index in path:
                value = value[index]
            return value

        def overwrite(value: Inputs) -> None:
            run(value, find(value))

        self._logits = find
        self.new: Operator[Inputs, Tensor] = Operator(
            name,
            inputs,
            Tensor,
            lambda value: run(value, None),
            lambda value: torch.empty_like(find(value), memory_format=torch.contiguous_format),
            once=once,
        )
        self.inplace: Operator[Inputs, None] = Operator(
            f"{name}_", inputs, type(None), overwrite, lambda value: None, mutates=(logits,)
        )

    def __call__(self, inputs: Inputs, *, inplace: bool) -> Tensor:
        """The gradient; with ``inplace`` in the memory of the logits."""
        if not inplace:
            return self.new(inputs)
        self.inplace(inputs)
        return self._logits(inputs)

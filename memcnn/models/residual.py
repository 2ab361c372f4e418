"""The residual functions f1, f2, ... of a block: block(x) = h2 with h1 = x + f1(x), h2 = h1 + f2(h1), and so on.

They are read from the block, never guessed. ``record`` returns the operations of the block's own ``forward``. In a sum
h + f, f is a residual function of h if every path from f back to the input leads through h. ``forward`` of an
``nn.TransformerEncoderLayer`` cannot be recorded; its documented structure is used.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from memcnn.models.recording import NotResidual, record

__all__ = ["NotResidual", "RecordedCall", "RecordedFunction", "Residual", "residual_of"]

_SUMS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, torch.relu_)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Residual(NamedTuple):
    """The residual functions of a block.

    Attributes:
        functions: f1, f2, ...; they hold the block's own modules and parameters.
        relu_after: True if the block applies a ReLU to its last sum.
    """

    functions: list[nn.Module]
    relu_after: bool


def residual_of(block: nn.Module, keywords: Mapping[str, bool] | None = None) -> Residual:
    """Return the residual functions of a block.

    Args:
        block: a module whose ``forward`` maps a tensor to one of the same shape.
        keywords: names of keyword arguments of the block, and whether each has a value; the others are None. The
            functions refuse calls where that is not so, because ``forward`` may depend on it.

    Raises:
        NotResidual: the block is not residual, or its structure cannot be read.
    """
    keywords = keywords or {}
    if isinstance(block, torch.jit.ScriptModule):
        raise NotResidual("torch.jit has compiled it, so that its operations cannot be read: use the original module")
    if any(getattr(block, name) for name in HOOKS):
        raise NotResidual("hooks are registered on the block itself, and would not run any more: remove them first")
    if "forward" in vars(block):
        raise NotResidual("its forward was replaced on the object, so that its class does not say what it computes")
    if type(block) is nn.TransformerEncoderLayer:
        return Residual(_of_encoder_layer(block), relu_after=False)
    training, evaluation = (_record(block, keywords, mode) for mode in (True, False))
    if len(training.graphs) != len(evaluation.graphs) or training.relu_after != evaluation.relu_after:
        raise NotResidual("its structure in training mode differs from that in evaluation mode")
    _, *others = inspect.signature(block.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.name not in keywords and p.default is not p.empty}
    attributes = tuple(dict.fromkeys([*training.attributes, *evaluation.attributes]))
    call = RecordedCall(type(block).__name__, dict(keywords), defaults, attributes)
    functions: list[nn.Module] = [
        RecordedFunction(block, {True: in_training, False: in_evaluation}, call)
        for in_training, in_evaluation in zip(training.graphs, evaluation.graphs, strict=True)
    ]
    _refuse_unused(block, functions)
    return Residual(functions, training.relu_after)


@dataclass(frozen=True)
class RecordedCall:
    """The call of a block that was recorded. Its ``forward`` may take another way in other calls.

    Attributes:
        origin: the name of the block's class.
        given: the names of the keyword arguments, and whether each had a value; the others were None.
        defaults: the defaults of the keyword arguments that were left out.
        attributes: the names of the block's attributes that ``forward`` read. Their values are constants now.
    """

    origin: str
    given: Mapping[str, bool]
    defaults: Mapping[str, Any]
    attributes: Sequence[str]

    def refuse_others(self, kwargs: Mapping[str, Any]) -> None:
        """Raise a TypeError unless the same keyword arguments have a value in this call."""
        for name, had_value in self.given.items():
            if had_value is (kwargs.get(name) is None):
                was, now = ("a value", "None or missing") if had_value else ("None", "not None")
                raise TypeError(
                    f"the keyword argument {name!r} is {now} in this call, but {self.origin} was made reversible with "
                    f"{was} for it, and may compute something else now: convert another stack with kwargs in which "
                    f"{name!r} is {now}"
                )
        for name in kwargs.keys() & self.defaults.keys():
            if not _alike(kwargs[name], self.defaults[name]):
                raise TypeError(
                    f"this call has the keyword argument {name!r}, but {self.origin} was made reversible without it: "
                    f"convert it with kwargs that contain {name!r}"
                )


def _alike(a: Any, b: Any) -> bool:
    """Return whether two keyword arguments are the same; None and False both leave something out."""
    if a is None or a is False:
        return b is None or b is False
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)


class RecordedFunction(nn.Module):
    """A part of a block's ``forward``. It holds the modules and parameters of the block that this part uses.

    Args:
        block: the block.
        graphs: the operations of the part in training mode (key True) and in evaluation mode (False). The first input
            is x, the others are keyword arguments.
        call: the call of the block that was recorded.
    """

    def __init__(self, block: nn.Module, graphs: Mapping[bool, fx.Graph], call: RecordedCall):
        super().__init__()
        self.training = block.training
        self.graphs, self.recorded_call = dict(graphs), call
        nodes = [node for graph in self.graphs.values() for node in graph.nodes]
        modules = {node.target for node in nodes if node.op == "call_module"}
        values = {node.target for node in nodes if node.op == "get_attr"}
        for path in [*sorted(modules, key=len), *sorted(values, key=len)]:
            _share(block, self, path)
        self._functions = self._compiled()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return f(x), of the shape of x. Keyword arguments of the block that f does not use have no effect."""
        function, names = self._functions[self.training]
        return function(self, x, **{name: kwargs[name] for name in names if name in kwargs})

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that the block's ``forward`` takes."""
        return set(names) & (self.recorded_call.given.keys() | self.recorded_call.defaults.keys())

    def __getstate__(self) -> dict:
        return {**vars(self), "_functions": None}  # a generated function cannot be pickled

    def __setstate__(self, state: dict) -> None:
        if "recorded_call" not in state:  # pickled by an earlier commit
            state["recorded_call"] = RecordedCall("a block", dict.fromkeys(state["keywords"], True), {}, ())
        super().__setstate__(state)
        self._functions = self._compiled()

    def _compiled(self) -> dict[bool, tuple[Callable, list[str]]]:
        """Return the graphs as Python functions, with the keyword arguments of each."""
        functions = {}
        for mode, graph in self.graphs.items():
            code = graph.python_code("self")
            names = dict(code.globals)
            exec(code.src, names)
            keywords = [str(node.target) for node in graph.nodes if node.op == "placeholder"][1:]
            functions[mode] = names["forward"], keywords
        return functions


class EncoderAttention(nn.Module):
    """Normalisation, self-attention, dropout of an ``nn.TransformerEncoderLayer`` with ``norm_first=True``."""

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm1, self.self_attn, self.dropout1 = layer.norm1, layer.self_attn, layer.dropout1

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return a tensor of the shape of x. The encoder calls the mask ``mask``, the layer ``src_mask``."""
        y = self.norm1(x)
        y = self.self_attn(
            y,
            y,
            y,
            attn_mask=src_mask if mask is None else mask,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            is_causal=bool(is_causal),
        )[0]
        return self.dropout1(y)


class EncoderFeedForward(nn.Module):
    """Normalisation and feed-forward network of an ``nn.TransformerEncoderLayer`` with ``norm_first=True``."""

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm2, self.linear1, self.dropout = layer.norm2, layer.linear1, layer.dropout
        self.linear2, self.dropout2, self.activation = layer.linear2, layer.dropout2, layer.activation

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x."""
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(self.norm2(x))))))


def _of_encoder_layer(layer: nn.TransformerEncoderLayer) -> list[nn.Module]:
    """Return the residual functions of an encoder layer: attention and feed-forward network."""
    if not layer.norm_first:
        raise NotResidual(
            "it normalises after each sum (norm_first=False), so that nothing of its input is passed on unchanged"
        )
    return [EncoderAttention(layer), EncoderFeedForward(layer)]


class _Graphs(NamedTuple):
    graphs: list[fx.Graph]
    relu_after: bool
    attributes: Sequence[str] = ()


def _record(block: nn.Module, keywords: Mapping[str, bool], training: bool) -> _Graphs:
    """Return a graph for each residual function of the block in training or evaluation mode."""
    graph, attributes = record(block, keywords, training)
    _skip_identities(block, graph)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    graphs, relu_after, _ = _split_at_sums(block, graph, x)
    return _Graphs(graphs, relu_after, attributes)


def _skip_identities(block: nn.Module, graph: fx.Graph) -> None:
    """Take every ``nn.Identity`` out of the graph: blocks of timm have one in place of a shortcut's layer."""
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            child = block.get_submodule(str(node.target).removeprefix("block."))
            if type(child) is nn.Identity and not any(getattr(child, name) for name in HOOKS):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _split_at_sums(block: nn.Module, graph: fx.Graph, x: fx.Node) -> _Graphs:
    """Split a recorded graph at its sums, from the last to the first."""
    end = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(end, fx.Node):
        raise NotResidual(f"it returns a {type(end).__name__} instead of one tensor")
    relu_after = _is_relu(block, end) and isinstance(end.args[0], fx.Node) and _terms(end.args[0]) is not None
    if relu_after:
        end = end.args[0]
    graphs: list[fx.Graph] = []
    while end is not x:
        stream, rest = _shortcut(end, x)
        graphs.insert(0, _graph_from(stream, rest))
        end = stream
    if not graphs:
        raise NotResidual("it returns its input")
    return _Graphs(graphs, relu_after)


def _shortcut(end: fx.Node, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the skip term of the sum ``end``, which all other terms are computed from, and these other terms."""
    terms = _terms(end)
    if terms is None:
        raise NotResidual(f"its last operation is {_operation_name(end)}, not a sum of its input and a function of it")
    # (a + b) + c is recorded as two sums. If no term of the outer one is the skip connection, replace each sum among
    # the terms by its own terms, and look again.
    while True:
        for i, stream in enumerate(terms):
            rest = terms[:i] + terms[i + 1 :]
            if all(_only_through(term, stream, x) for term in rest) and _leads_to(stream, x):
                return stream, rest
        longer = [inner for term in terms for inner in (_terms(term) or [term])]
        if len(longer) == len(terms):
            raise NotResidual(
                f"its sum {_operation_name(end)} has no skip connection: one term must be the value that all "
                "the others are computed from"
            )
        terms = longer


def _terms(node: fx.Node) -> list[fx.Node] | None:
    """Return the two terms of a sum; None if the node is something else."""
    is_sum = (node.op == "call_function" and node.target in _SUMS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    terms = [term for term in node.args if isinstance(term, fx.Node)]
    return terms if is_sum and not node.kwargs and len(terms) == len(node.args) == 2 else None


def _only_through(node: fx.Node, stream: fx.Node, x: fx.Node) -> bool:
    """Return whether every path from ``node`` back to ``x`` leads through ``stream``."""
    return x not in _ancestors(node, stream)


def _leads_to(stream: fx.Node, x: fx.Node) -> bool:
    return stream is x or x in _ancestors(stream, None)


def _ancestors(node: fx.Node, stop: fx.Node | None) -> set[fx.Node]:
    """Return the node and all nodes that it is computed from, as far back as ``stop``, which is not included."""
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not stop and node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _graph_from(stream: fx.Node, terms: Sequence[fx.Node]) -> fx.Graph:
    """Return a graph of the sum of the terms as a function of ``stream``, without the "block." of all names."""
    needed = set().union(*(_ancestors(term, stream) for term in terms))
    graph = fx.Graph()
    copies = {stream: graph.placeholder("x")}
    nodes = list(stream.graph.nodes)
    for node in sorted(needed, key=nodes.index):
        new = graph.node_copy(node, copies.__getitem__)
        new.meta.clear()  # it names the block's class, which may not be picklable
        if node.op in ("call_module", "get_attr"):
            new.target = str(node.target).removeprefix("block.")
        copies[node] = new
    graph.output(reduce(lambda a, b: graph.call_function(torch.add, (a, b)), (copies[term] for term in terms)))
    return graph


def _is_relu(block: nn.Module, node: fx.Node) -> bool:
    """Return whether the operation is a ReLU."""
    if node.op == "call_module":
        return type(block.get_submodule(str(node.target).removeprefix("block."))) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELUS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _operation_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removeprefix("block.")


def _share(block: nn.Module, part: nn.Module, path: str) -> None:
    """Give ``part`` the module, parameter or buffer of ``block`` at ``path``, under the same path."""
    *outer, name = path.split(".")
    for step in outer:
        if not hasattr(part, step):
            part.add_module(step, nn.Module())
        block, part = getattr(block, step), getattr(part, step)
    if hasattr(part, name):
        return
    value = getattr(block, name)
    if isinstance(value, nn.Module):
        part.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        part.register_parameter(name, value)
    else:
        part.register_buffer(name, value, persistent=name in block.state_dict())


def _refuse_unused(block: nn.Module, functions: Sequence[nn.Module]) -> None:
    used = {id(parameter) for function in functions for parameter in function.parameters()}
    if unused := [name for name, parameter in block.named_parameters() if id(parameter) not in used]:
        raise NotResidual(f"its forward does not use its parameter {unused[0]}, which would be lost")

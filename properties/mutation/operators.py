"""The mutations: one of Cosmic Ray's for each operator of the language, and what it lacks, the deletions.

An operator says where in a tree it can mutate, and mutates there: see ``cosmic_ray.operators.operator``. Messages, type
hints and docstrings are not mutated. A deletion asks the most of the tests: that everything written is needed.
"""

import parso
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import OPERATOR_PROVIDERS
from parso.python.tree import PythonNode

REPLACED = {
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul",
    "ReplaceComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is",
    "ReplaceUnaryOperator": "Delete_USub Delete_Not",
}
"""Cosmic Ray puts every operator in the place of every other: one exchange for each is enough, or a bound moved."""
OTHERS = [
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
]


class Deletion(Operator):
    """A subclass names, for a node, pairs of a part of it and the code that is left of the node without that part."""

    def remainders(self, node):
        raise NotImplementedError

    def mutation_positions(self, node):
        for part, _ in self.remainders(node):
            yield part.start_pos, part.end_pos

    def mutate(self, node, index):
        _, code = list(self.remainders(node))[index]
        return parso.parse(_indent(node) + code)

    @classmethod
    def examples(cls):
        return ()


class DeleteStatement(Deletion):
    """``pass`` in the place of a call, a return, a raise, or an assignment to what had a value before."""

    def remainders(self, node):
        if node.type != "simple_stmt" or not parso.python.tree.search_ancestor(node, "funcdef"):
            return
        statement, *end = node.children
        if statement.type in ("return_stmt", "raise_stmt", "del_stmt", "atom_expr") or (
            statement.type == "expr_stmt" and _changes_something(statement)
        ):
            yield statement, "pass" + "".join(leaf.get_code() for leaf in end)


class DropOperand(Deletion):
    """``a and b`` without a, and without b; likewise for ``or``."""

    def remainders(self, node):
        if node.type in ("and_test", "or_test"):
            operator = f" {node.children[1].value} "
            operands = node.children[::2]
            for operand in operands:
                yield operand, operator.join(_code(other) for other in operands if other is not operand)


class DropKeyword(Deletion):
    """A call without one of its keyword arguments, but for zip's strict=False, which is its default."""

    def remainders(self, node):
        if node.type != "trailer" or node.children[0].value != "(" or len(node.children) != 3:
            return
        inside = node.children[1]
        arguments = inside.children[::2] if inside.type == "arglist" else [inside]
        for argument in arguments:
            if argument.type == "argument" and argument.children[1] == "=" and _code(argument) != "strict=False":
                yield argument, "(" + ", ".join(_code(other) for other in arguments if other is not argument) + ")"


class DropFilter(Deletion):
    """A comprehension without its condition."""

    def remainders(self, node):
        is_loop = isinstance(node, PythonNode) and node.type in ("comp_for", "sync_comp_for")
        if is_loop and node.children[-1].type == "comp_if":
            yield node.children[-1], "".join(child.get_code() for child in node.children[:-1]).lstrip()


def choose() -> None:
    """Leave Cosmic Ray these operators alone."""
    core = OPERATOR_PROVIDERS["core"]
    names = OTHERS + [f"{kind}_{exchange}" for kind, exchanges in REPLACED.items() for exchange in exchanges.split()]
    OPERATOR_PROVIDERS.clear()
    OPERATOR_PROVIDERS["core"] = {name: core[name] for name in names}
    OPERATOR_PROVIDERS["core"]["ReplaceBinaryOperator_Mul_Div"] = _between_terms(core["ReplaceBinaryOperator_Mul_Div"])
    OPERATOR_PROVIDERS["memcnn"] = {c.__name__: c for c in (DeleteStatement, DropOperand, DropKeyword, DropFilter)}


def _between_terms(operator: type[Operator]) -> type[Operator]:
    """Without the star of ``def f(x, *, option)``, which Cosmic Ray takes for a product."""

    class BetweenTerms(operator):
        def mutation_positions(self, node):
            if getattr(node.parent, "type", None) not in ("parameters", "lambdef"):
                yield from super().mutation_positions(node)

    return BetweenTerms


def _changes_something(assignment) -> bool:
    """Not the first assignment of a local name, without which the next line fails."""
    targets, value = assignment.children[0], assignment.children[-1]
    if assignment.children[1].type == "annassign" and len(assignment.children[1].children) < 4:
        return False
    names = {name.value for name in assignment.get_defined_names()}
    again = {leaf.value for leaf in _leaves(value) if leaf.type == "name"}
    return (
        assignment.children[1] != "="
        or bool(names & again)
        or any(leaf.type == "operator" and leaf.value in ".[" for leaf in _leaves(targets))
    )


def _leaves(node):
    leaf, last = node.get_first_leaf(), node.get_last_leaf()
    while True:
        yield leaf
        if leaf is last:
            return
        leaf = leaf.get_next_leaf()


def _indent(node) -> str:
    return node.get_first_leaf().prefix


def _code(node) -> str:
    return node.get_code(include_prefix=False)

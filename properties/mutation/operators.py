"""The mutations: one of Cosmic Ray's for each operator of the language, and deletions, which it lacks.

An operator returns the places of a syntax tree that it can mutate, and mutates one of them: see
``cosmic_ray.operators.operator``. Messages, type hints and docstrings are not mutated. Deletions are hard
to detect: the tests must show that all code is needed.
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
"""Cosmic Ray replaces every operator by every other. One replacement for each is enough here."""
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
    """An operator that deletes parts of nodes. Subclasses define ``remainders``."""

    def remainders(self, node):
        """Yield a pair for each part of the node that can be deleted: the part, and the node's code without it."""
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
    """Put ``pass`` in place of a call, a return, a raise, a del, or an assignment that changes an earlier value."""

    def remainders(self, node):
        if node.type != "simple_stmt" or not parso.python.tree.search_ancestor(node, "funcdef"):
            return
        statement, *end = node.children
        if statement.type in ("return_stmt", "raise_stmt", "del_stmt", "atom_expr") or (
            statement.type == "expr_stmt" and _changes_something(statement)
        ):
            yield statement, "pass" + "".join(leaf.get_code() for leaf in end)


class DropOperand(Deletion):
    """Turn ``a and b`` into ``a``, or into ``b``; likewise for ``or``."""

    def remainders(self, node):
        if node.type in ("and_test", "or_test"):
            operator = f" {node.children[1].value} "
            operands = node.children[::2]
            for operand in operands:
                yield operand, operator.join(_code(other) for other in operands if other is not operand)


class DropKeyword(Deletion):
    """Delete a keyword argument of a call; not ``strict=False`` of zip, which is its default."""

    def remainders(self, node):
        if node.type != "trailer" or node.children[0].value != "(" or len(node.children) != 3:
            return
        inside = node.children[1]
        arguments = inside.children[::2] if inside.type == "arglist" else [inside]
        for argument in arguments:
            if argument.type == "argument" and argument.children[1] == "=" and _code(argument) != "strict=False":
                yield argument, "(" + ", ".join(_code(other) for other in arguments if other is not argument) + ")"


class DropFilter(Deletion):
    """Delete the condition of a comprehension."""

    def remainders(self, node):
        is_loop = isinstance(node, PythonNode) and node.type in ("comp_for", "sync_comp_for")
        if is_loop and node.children[-1].type == "comp_if":
            yield node.children[-1], "".join(child.get_code() for child in node.children[:-1]).lstrip()


def choose() -> None:
    """Leave Cosmic Ray only these operators."""
    core = OPERATOR_PROVIDERS["core"]
    names = OTHERS + [f"{kind}_{exchange}" for kind, exchanges in REPLACED.items() for exchange in exchanges.split()]
    OPERATOR_PROVIDERS.clear()
    OPERATOR_PROVIDERS["core"] = {name: core[name] for name in names}
    OPERATOR_PROVIDERS["core"]["ReplaceBinaryOperator_Mul_Div"] = _between_terms(core["ReplaceBinaryOperator_Mul_Div"])
    OPERATOR_PROVIDERS["memcnn"] = {c.__name__: c for c in (DeleteStatement, DropOperand, DropKeyword, DropFilter)}


def _between_terms(operator: type[Operator]) -> type[Operator]:
    """Return the operator without the star of ``def f(x, *, option)``, which Cosmic Ray takes for a product."""

    class BetweenTerms(operator):
        def mutation_positions(self, node):
            if getattr(node.parent, "type", None) not in ("parameters", "lambdef"):
                yield from super().mutation_positions(node)

    return BetweenTerms


def _changes_something(assignment) -> bool:
    """Return False for the first assignment to a local name: without it, the next line would just fail."""
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

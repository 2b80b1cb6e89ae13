"""What is left to do in an answer: 3+4 is 7, 555_{10} is 4210_5, and 2x+3=9 says that x is 3, but none of them answers.

An answer that is a number, or a solution, has to be one: a sum, product or quotient of rational numbers, a factorial, a
function's value, a power of a sum, letters that cancel, an equation that is not solved for its name and a base that was
not asked for are left to do. Fractions (3/6 and \\frac{6}{2} as well), mixed numbers, powers, roots, percentages, \\pi,
e, i, 3\\cdot10^8 and what is made of them (2\\pi/3, 1+\\sqrt{2}, 2+5i) are numbers. What the answer itself leaves to
do, a prediction may leave as well.
"""

from collections.abc import Iterable, Iterator

from stages.core.grading.verifier import grammar
from stages.core.grading.verifier.forms import (
    Approximation,
    Form,
    Ordered,
    Relation,
    Rows,
    Several,
    Value,
    is_name,
    read_canonical,
)
from stages.core.grading.verifier.grammar import Tree

_UNSOLVED = frozenset(["letters", "unsolved"])
_NOTHING: frozenset[str] = frozenset()


def is_unevaluated(answer: Form, prediction: Form) -> bool:
    """Whether a prediction that equals the answer leaves something to do that the answer does not."""
    if isinstance(answer, Value) and isinstance(prediction, Several):  # 3/4 or 0.75
        return all(is_unevaluated(answer, item) for item in prediction.items)
    if answer == prediction:
        return False
    if (
        isinstance(answer, Value)
        and isinstance(prediction, Value)
        and answer.number is not None
        and prediction.number is None
    ):
        return True
    allowed, left = _of_form(answer), _of_form(prediction)
    if not any(kind.startswith("base") for kind in allowed):
        allowed |= {"base 10"}
    return not left <= (allowed | _UNSOLVED if allowed & _UNSOLVED else allowed)


def _of_form(form: Form) -> frozenset[str]:
    """What is left to do, by kind, and the bases of the numbers."""
    if isinstance(form, Value):
        return _of_value(form.tree) | {f"base {form.base}"}
    if isinstance(form, Approximation):
        return _of_form(form.exact)
    if isinstance(form, Relation):
        return _of_relation(form)
    if isinstance(form, Several | Ordered):
        return _NOTHING.union(*map(_of_form, form.items))
    if isinstance(form, Rows):
        cells = [cell for row in form.rows for cell in row]
        if form.is_scaled:  # 2 times a matrix is a way of writing one
            return _NOTHING.union(*(_of_value(part) for cell in cells for part in cell.tree.args))  # type: ignore[union-attr]
        return _NOTHING.union(*map(_of_form, cells))
    return _NOTHING


def _of_value(tree: Tree) -> frozenset[str]:
    free = grammar.names(tree) - {part.args[1].text for part in grammar.walk(tree) if part.op == "over"}
    return frozenset(["letters"] if free else _of_tree(tree))


def _of_relation(relation: Relation) -> frozenset[str]:
    members = [read_canonical(member) for member in relation.members if not is_name(member)]
    left = [_of_form(member) for member in members]
    if set(relation.signs) == {"="}:
        if len(members) < len(relation.members) or not any("letters" in kinds for kinds in left):
            return min(left, key=len, default=_NOTHING)  # x = 4+5 = 9
        return frozenset(["unsolved"])
    if len(members) == len(relation.members) and not _has_one_term_a_side(members):
        return frozenset(["unsolved"])
    return _NOTHING.union(*left) - {"letters"} if len(members) == len(relation.members) else _NOTHING.union(*left)


def _has_one_term_a_side(members: list[Form]) -> bool:
    """-x < -2, 0 < x-2: a name, or less a name, and one number: nothing is left to do but to turn it round."""
    if not all(isinstance(member, Value) for member in members):
        return False
    terms = [term for member in members if isinstance(member, Value) for term in _flat("+", member.tree)]
    named = [term for term in terms if grammar.names(term)]
    numbers = [term for term in terms if not grammar.names(term) and grammar.exact(term) != 0]
    return len(members) == 2 and len(named) == 1 and named[0].op == "name" and len(numbers) <= 1


def _flat(op: str, tree: Tree) -> Iterator[Tree]:
    """The terms of a sum, or factors of a product, without their signs."""
    if tree.op == "neg":
        yield from _flat(op, tree.args[0])
    elif tree.op == op and tree.text != "degrees":
        for arg in tree.args:
            yield from _flat(op, arg)
    else:
        yield tree


def _of_tree(tree: Tree) -> Iterator[str]:
    """The kinds of operation that are left to do in a number."""
    if tree.op in ("number", "name", "mixed"):
        return
    if tree.op == "neg" and tree.args[0].op == "neg":
        yield "sign"
    elif tree.op == "+" and _num_rational(_flat("+", tree)) > 1:
        yield "sum"
    elif tree.op == "*" and not _is_scientific(tree) and _is_product(list(_flat("*", tree))):
        yield "product"
    elif tree.op == "/" and _is_quotient(tree):
        yield "quotient"
    elif tree.op == "^" and tree.args[0].op in ("+", "^"):
        yield "product"
    elif tree.op == "root" and tree.args[1].op == "root":
        yield "root"
    elif tree.op in ("!", "binom", "over"):
        yield tree.op
    elif tree.op == "call" and tree.text != r"\exp":
        yield "call"
    for arg in tree.args:
        yield from _of_tree(arg)


def _num_rational(trees: Iterable[Tree]) -> int:
    return sum(grammar.exact(tree) is not None or (tree.op == "^" and tree.args[0].text == "i") for tree in trees)


def _is_scientific(tree: Tree) -> bool:
    """3\\cdot10^{8}."""
    left, right = tree.args
    return left.op == "number" and right.op == "^" and right.args[0] == grammar.number("10")


def _is_product(factors: list[Tree]) -> bool:
    alike = (sum(factor.op == op for factor in factors) for op in ("root", "+"))
    return _num_rational(factors) > 1 or max(alike) > 1 or sum(factor.text == "i" for factor in factors) > 1


def _is_quotient(tree: Tree) -> bool:
    r"""6/2, 6\div4, a fraction of fractions, or by a complex sum; not 3/6 and \frac{6}{2}."""
    value = grammar.exact(tree)
    if value is None:
        return tree.args[1].op == "+" and "i" in grammar.names(tree.args[1], constants=True)
    ops = {part.op for side in tree.args for part in _flat("", side)}
    return (value.denominator == 1 and tree.text == "/") or tree.text == r"\div" or bool(ops & {"/", "mixed"})

"""The verifier: whether a completion's answer is the problem's, and what that pays. This page tells the whole reading.

    with Verifier() as verifier:
        batch = verifier.submit([("So it is \\boxed{\\frac12}.", "0.5")])    # returns at once
        [Score(verdict="correct", reward=1.0, prediction="\\frac12")] = batch.result()

In the order in which it happens:

1. `extraction` finds the answer in the completion: the last box, or a final line that names it. There is none
   (`no_answer`) in a thought that never ends, behind a box that is cut off, or where a hedge follows at once.
2. `verdicts` looks up its memo, and hands what text alone can't decide to a worker. Both go on as follows.
3. `quantities.name_units` spells the words that answer or prompt name as units.
4. `notation` brings the many spellings of one thing to plain LaTeX: Unicode, fractions, spaces, thousands, \\text.
   What nobody can read, and what is too long or too deep, is refused (`rejected`).
5. `forms` reads what kind of answer it is: a union, list, set, tuple, interval, relation, matrix, congruence, ratio, a
   number in some base, words, or one value; brackets and signs outside of all brackets decide (`latex` finds them).
6. A value is a number or expression with its unit, which `quantities` cuts off. `grammar` reads the expression to a
   tree, in which each construct means one thing, and gives its exact value where that is rational. What the grammar
   does not read is words, and equals the same words only.
7. `comparison` holds the two forms against each other, part by part. Rational numbers are compared as fractions; for
   other values `algebra`, in the worker, makes sympy's objects of the trees, and evaluates both to many digits at a few
   points (`timeout`, `error` where it can't within bounds). Not equal is `wrong`.
8. `pending` asks what is left to do in an answer that is equal: 3+4 for 7 is `unevaluated`, 7 is `correct`. Only
   `correct` is rewarded, and `unevaluated` where that is accepted.
"""

from stages.core.grading.verifier.verdicts import VERSION, Verifier, default_workers

__all__ = ["VERSION", "Verifier", "default_workers"]

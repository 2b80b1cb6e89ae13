"""Answers: found in completions (extraction), read (notation, quantities, forms), compared (comparison, algebra)."""

from stages.core.answers.extraction import extract

__all__ = ["extract"]

"""Completions in, scores out: math-verify's verifier and rewards of one's own, in worker processes with bounds.

rl, sample and eval grade through a `Grader`; prepare and regrade ask the verifier alone.
"""

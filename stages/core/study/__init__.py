"""What runs say together: which outputs descend from the base, metrics of results, and figures.

eval, regrade, analyze and report use it; it knows no engine, no grader and no weights.
"""

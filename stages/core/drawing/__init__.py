"""Problems in, rollouts out: templates make prompts, vLLM completes them, a grader scores each group.

rl, sample and eval draw; policies, problems and sampling are read and checked as one request.
"""

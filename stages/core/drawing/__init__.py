"""Problems in, rollouts out: templates make prompts, vLLM completes them, a grader scores each group.

rl, sample and eval draw; what they are asked for is read and checked as one request.
"""

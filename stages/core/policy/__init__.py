"""A policy's weights: read and written as a checkpoint directory, adapted by LoRA, trained under accelerate.

rl, rft, merge, toy and eval use it, and `core.drawing` reads a policy's tokenizer and weights through it.
"""

"""Attention kernels that a shared prefix works with; known apart from it, so that a prediction need not load torch."""

SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Values of `attn_implementation`. Flash kernels align a causal mask to the last query."""

"""Tensors in, tensors out: shapes, decoder, cache, checkpoints. Knows nothing of drafting or of text."""

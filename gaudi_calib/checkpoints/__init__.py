"""Weights on disk: read tensor by tensor, dequantized, planned as vLLM's nodes, converted."""

"""Speculative decoding: several tokens a step."""

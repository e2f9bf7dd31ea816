"""A model directory: found, read, written, checked."""

"""Sizes of `linear_int8_static`, for all of its tests."""

CASES = ((1, 1, 1), (1, 5408, 130), (2, 33, 9), (5, 130, 17), (13, 64, 300), (70, 257, 131), (300, 64, 8), (0, 8, 4))
"""Rows, inputs, outputs: around the edges of tiles and of what threads take, one that reads a part of the weights."""

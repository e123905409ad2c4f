"""Calls of the max-pool of integers, for its tests and for the sanitizer's."""

import torch

CASES = (
    ((1, 1, 2, 2), 2),
    ((2, 1, 5, 5), 2),
    ((3, 32, 26, 26), 2),
    ((2, 5, 7, 9), 3),
    ((4, 40, 33, 17), 2),
    ((2, 117, 8, 8), 4),
    ((1, 16, 4, 4), 1),
    ((0, 3, 4, 4), 2),
)
"""N, C, H, W around a vector's width, with rows and columns left over; and the side of the squares."""


def images(shape):
    """One image in NCHW, in NHWC, and in neither."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    return x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)

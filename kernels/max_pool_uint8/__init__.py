"""Max-pool between integer layers, for inference on CPU: squares that touch and do not overlap, in 8 bits.

    y[n, c, i, j] = max over a, b in 0…P-1 of x[n, c, i P + a, j P + b]

- `reference.py`: the same in plain torch operations.
- `cpu_kernel.cpp`: the kernel: whole vectors of channels of NHWC images. On the way out it can turn them into NCHW,
  which is what a linear layer behind the pool reads.
- `torch_op.py`: `torch.ops.perfkit.max_pool_uint8`.

Why: torch 2.13 pools 32 channels of integers at a tenth of the memory's speed, and its compiler turns NHWC into NCHW
byte by byte.
"""

"""A convolution of 8-bit activations on a known grid, with the ReLU and max-pool behind it, for inference on x86 CPUs.

    q = clamp(round(x / scale) + zero, 0, top)
    y = the largest in each window of act(float(Σ (q - zero) w) scale w_scale + bias)

Numbers are those of `perfkit.kernels.linear_int8_static`: exact int32 sums, then float32 operations rounded once each,
so results are equal to `reference` bit for bit on every processor. What scales, adds, cuts and rounds keeps the order
of numbers, so the largest is taken of the sums.

- `torch_op.py`, `jax_op.py`: the public functions, the latter by `cpu_ffi.cpp`; `cpu_shape.py`: who takes a call, and
  what it is told; `problem.py`: one call without its numbers; `reference.py`: plain operations.
- `cpu_kernel.cpp`: of few input channels lanes are places (`cpu_planes.hpp`), of more they are output channels
  (`cpu_channels.hpp`). Both round x on the way in.
- `cases.py`: the sizes of all tests.
"""

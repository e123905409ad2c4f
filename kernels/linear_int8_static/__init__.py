"""A linear layer of 8-bit activations on a grid that is known before the call, for inference on x86 CPUs.

    q = clamp(round(x / scale) + zero, 0, top),    y = act(float(Σ (q - zero) w) scale w_scale + bias)

Sums are exact int32; what follows is float32, each operation rounded once, in that order: results are equal to
`reference` bit for bit on every processor. Divisions by the scale are products with its inverse, as in torch. NaN in x
becomes the q of 0, an infinity one of the grid's ends.

- `torch_op.py`, `jax_op.py`: the public functions, the latter by `cpu_ffi.cpp`; `cpu_shape.py`: who takes a call, and
  what it is told; `problem.py`: one call without its numbers; `reference.py`: plain operations.
- `cpu_kernel.cpp`: lanes are outputs; it rounds x on the way in. `cpu_kernel.py`: called on torch tensors.
- `cases.py`: the sizes of all tests.

Source: https://arxiv.org/abs/1712.05877, section 2.2
"""

"""Recurrent layers (LSTM, GRU, RNN) whose matrix products are integer products, for inference on CPU.

With q(v) the quantized and s(v) the scale of v, s_n that of output channel n of a weight matrix:

    input part    a_n = s(x) s_n sum_k q(x)_k q(W_ih)_nk + b_n
    hidden part   u_n = s(h) s_n sum_k q(h)_k q(W_hh)_nk
    LSTM          i, f, o = sigmoid(a + u); g = tanh(a + u); c' = f c + i g; h' = o tanh(c')
    GRU           r, z = sigmoid(a + u); n = tanh(a + r (u + b_hn)); h' = (1 - z) n + z h
    RNN           h' = tanh(a + u) or max(0, a + u)

All q lie in [-127, 127] and round to nearest. Weights: one scale for each output channel, its largest magnitude / 127.
Activations: one scale for each batch row and step, max(floor, largest magnitude) / 127. The floor is 1 for hidden
states of LSTM, GRU and tanh, which makes it the static 1/127 unless an initial state lies outside of [-1, 1]; it is 0
for inputs and for relu, which have no bound. A calibrated scale may be given for the first layer's input instead, and
of a single layer (in JAX) for hidden states. Sums
are int32, everything else float32, powers of 2 in the gates to 1.1e-4. An infinite or NaN number makes the rest of its
row's sequence NaN.

- `weights.py`: quantizing weights, and the layout in which the kernel reads them.
- `reference.py`: the same in plain torch operations, bit for bit.
- `cpu_kernel.cpp`: a whole stack of layers; `cpu_line.hpp`: the steps of one direction of one layer; `cpu_inputs.hpp`:
  what they are given; `cpu_directions.hpp`: what is the same for all rows and steps; `cpu_cells.hpp`: the cells;
  `cpu_products.hpp`: integer products and rounding, with AVX512-VNNI, AVX-VNNI, AVX2, ARM's DotProd, or plain C++.
- `torch_op.py`: `torch.ops.perfkit.rnn_int8`, all layers and directions.
- `problem.py`, `jax_op.py`, `cpu_ffi.cpp`: one direction of one layer in JAX.

Source: https://arxiv.org/abs/1609.08144 (section 6, integer LSTM inference)
"""

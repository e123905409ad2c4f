"""Several layers, each on the CPU kernel of its op, by one call, for inference in torch.

A call of one layer takes some microseconds in Python: its checks, its output, and the way into the kernel. A model of
a few small layers is little else. `cpu_kernel.py` has what a call needs worked out before; who knows that nothing of it
has changed since makes all calls at once.
"""

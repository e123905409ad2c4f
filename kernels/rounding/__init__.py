"""float32 numbers in bfloat16 as a custom call of XLA's on CPU: for what enters a program whose layers are kernels.

XLA runs a program on the thread that calls it where it counts few operations, and hands others to a thread of its own,
which takes tens of microseconds each way. It does not count what custom calls do, so a program of kernels is called
directly, unless it casts its input itself.
"""

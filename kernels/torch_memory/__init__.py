"""Memory of torch tensors on the CPU that stays from call to call, in calls that ask for it.

- `allocator.cpp`: a cache before torch's allocator, where torch's C++ interface lets others put one. Unlike kernels it
  is built with torch's headers, for the version that is installed.
- `allocator.py`: the same from Python.
"""

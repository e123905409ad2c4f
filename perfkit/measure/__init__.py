"""Measuring plain callables and plain arrays: time, memory, fidelity, the machine. Imports no framework."""

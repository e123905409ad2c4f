"""Training in less memory: micro-batches, recomputing, memory of the host, states in fewer bits."""

"""Where the time, the memory and the energy of a model go, and which recipe addresses it."""

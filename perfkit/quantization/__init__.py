"""Integer and float8 layers, ranges of activations, training with rounding. A file per framework and matter."""

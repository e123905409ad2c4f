"""Units followed through a model, ranked and cut out; masks; low rank. A file per framework and matter."""

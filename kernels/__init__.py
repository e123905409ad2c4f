if __name__ != "perfkit.kernels":
    raise ImportError(f"import perfkit.kernels, not {__name__!r}: the repository root is on sys.path")

"""Kernels in C++ (`src/`), compiled when the package is installed and called through ctypes, which releases the GIL.

One library serves all machines: `library.py` loads it, and it chooses among AVX-512 with BF16, AVX-512, AVX2 and
portable code when it runs.
"""

"""The CPU kernels are C++ code (`src/`), compiled at installation and called through ctypes, which releases the GIL.

One library serves all machines. `library.py` loads it, and at run time the library chooses among code for AVX-512 with
BF16, AVX-512, AVX2 and any other CPU.
"""

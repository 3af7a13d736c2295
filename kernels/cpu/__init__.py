"""The CPU kernels are C++ code (`src/`), compiled at installation and called through ctypes, which releases the GIL.

The module `library` loads the compiled library. The library contains machine code for five kinds of CPU: with AMX for
bf16, with AVX-512 and its BF16 extension, with AVX-512, with AVX2, and without these. At run time the library chooses
the code for its CPU.
"""

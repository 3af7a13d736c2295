"""The CPU kernels are C++ code (`src/`), compiled at installation and called through ctypes, which releases the GIL.

The module `library` loads the compiled library. On x86-64 the library contains machine code for five kinds of CPU: with
AMX for bf16, with AVX-512 and its BF16 extension, with AVX-512, with AVX2, and without these. On ARM it contains
machine code for three kinds: every 64-bit CPU, CPUs with the instruction SDOT, and CPUs with BFMMLA and SMMLA. At run
time the library chooses the code for its CPU.
"""

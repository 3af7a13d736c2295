// This header declares the matrix products that use the tiles of the processor extension AMX, or an emulation of them.
#pragma once
#include "gemm.h"

// Whether the processor has AMX for bf16, and the operating system lets this process use it.
enum class AmxState : int64_t { absent, usable, refused, not_compiled };
AmxState amx_state();

// These functions compute products and layers of experts as the functions `linear` and `run_experts` do, with AMX if
// `wanted` is Level::amx, and with the emulation if `wanted` is Level::amx_emulated.
void amx_linear(Level wanted, const Product<bf16>& product);
void amx_experts(Level wanted, const Experts<bf16>& experts);

#include "formats.inl"
#include "gemm.inl"
#include "silu.inl"
#include "experts.inl"

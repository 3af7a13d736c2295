#include "gemm.inl"
#include "silu.inl"
#include "experts.inl"

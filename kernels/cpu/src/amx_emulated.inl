#include "formats.inl"
#include "factors.inl"
#include "silu.inl"
#include "entries.inl"
namespace emulated {
#include "amx_tiles.inl"
#include "amx.inl"
#include "amx_work.inl"
#include "amx_tiles_end.inl"
}

namespace emulated {
#define TILES
#include "lanes.inl"
#include "amx_tiles.inl"
#include "attention.inl"
#include "amx_tiles_end.inl"
#undef TILES
}

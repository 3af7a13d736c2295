// This file removes the macros of `amx_tiles.inl`.
#undef TILE_ZERO
#undef TILE_INPUTS_WRITTEN
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_PRODUCT

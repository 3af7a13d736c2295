// This header defines the C++ form of the Python class `kernels.ops.Segments`. For each sequence of a ragged batch, the
// struct `Segments` says which rows the sequence has and which slot has the sequence's state.
#pragma once
#include "common.h"

struct Segments {
    int64_t count;  // number of sequences
    const int32_t* query_start;  // query_start: [count + 1], or null if each sequence has one row
    const int32_t* state_ids;    // state_ids: [count], the state slot of each sequence
    const uint8_t* has_state;  // has_state: [count], or null if every sequence has a state
    const int32_t* save_start;  // save_start: [count + 1], or null if no state is saved inside a chunk
    const int32_t* save_rows;
    const int32_t* save_slots;

    int64_t begin(int64_t i) const { return query_start ? query_start[i] : i; }
    int64_t end(int64_t i) const { return query_start ? query_start[i + 1] : i + 1; }
    bool continues(int64_t i) const { return !has_state || has_state[i]; }
    int64_t first_save(int64_t i) const { return save_start ? save_start[i] : 0; }
    int64_t last_save(int64_t i) const { return save_start ? save_start[i + 1] : 0; }
};

// Returns the number of channels in a piece of work, a multiple of the vector width `width`. If there are enough
// channels, every thread gets several pieces, and each piece has enough channels to read whole cache lines.
inline int64_t piece_channels(int64_t channels, int64_t width) {
    const int64_t fair = channels / (4 * num_threads()) / width * width;
    return fair < width ? width : fair < 8 * width ? fair : 8 * width;
}

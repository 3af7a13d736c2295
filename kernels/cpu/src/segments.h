// How the rows of a ragged batch fall into sequences, and where their states live: `kernels.ops.Segments`.
#pragma once
#include "common.h"

struct Segments {
    int64_t count;               // of sequences
    const int32_t* query_start;  // [count + 1]; null where each has one row
    const int32_t* state_ids;    // [count]
    const uint8_t* has_state;    // [count]; null where all have one
    const int32_t* save_start;   // [count + 1]; null without interior saves
    const int32_t* save_rows;
    const int32_t* save_slots;

    int64_t begin(int64_t i) const { return query_start ? query_start[i] : i; }
    int64_t end(int64_t i) const { return query_start ? query_start[i + 1] : i + 1; }
    bool continues(int64_t i) const { return !has_state || has_state[i]; }
    int64_t first_save(int64_t i) const { return save_start ? save_start[i] : 0; }
    int64_t last_save(int64_t i) const { return save_start ? save_start[i + 1] : 0; }
};

// How many channels, in whole vectors, make a piece of work: enough to read whole cache lines, few enough that every
// thread gets some pieces.
inline int64_t piece_channels(int64_t channels, int64_t width) {
    const int64_t fair = channels / (4 * num_threads()) / width * width;
    return fair < width ? width : fair < 8 * width ? fair : 8 * width;
}

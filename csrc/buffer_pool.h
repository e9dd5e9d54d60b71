// Large buffers that are used again. The system takes pages of megabytes back when they are freed, and faulting them in
// anew at every training iteration would cost as much as a third of it.
#pragma once

#include <cstddef>

namespace llmdpd {

// At least `floats` floats, aligned to 64 bytes, with whatever they last held; give it back by `release`.
float* acquire_buffer(std::size_t floats);
void release_buffer(float* buffer);

}  // namespace llmdpd

// The kernels that an exported policy uses: those of the best instruction set that the CPU has, of those that the source
// was compiled for.
#pragma once

#include "tile/layer_kernels.h"
#include "tile/tile_kernels.h"

namespace llmdpd {

struct InstructionSet {
  const char* name;
  const TileKernels* tile;
  const LayerKernels* layers;
};

const InstructionSet& best_instruction_set();

}  // namespace llmdpd

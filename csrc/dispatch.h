// Which instruction set's object runs on this CPU.
#pragma once

#include <string>
#include <vector>

#include "tile/layer_kernels.h"
#include "tile/tile_kernels.h"

namespace llmdpd {

std::vector<std::string> compiled_isas();  // slowest first
std::vector<std::string> runnable_isas();  // those of them that this CPU has

std::string active_isa();
// The best one for an empty name. Throws std::invalid_argument for one that can't run here.
void set_isa(const std::string& name);
const TileKernels& active_kernels(bool bf16);
const LayerKernels& active_layers();

}  // namespace llmdpd

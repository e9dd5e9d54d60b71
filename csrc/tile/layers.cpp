// Layers with gradients, and the context without. Compiled once for each instruction set, LLMDPD_ISA naming the namespace.
#include "attention_tile.h"
#include "context_tile.h"
#include "linear_tile.h"
#include "optimizer_tile.h"
#include "waypoint_tile.h"

namespace llmdpd::LLMDPD_ISA {

extern const LayerKernels layer_kernels;
const LayerKernels layer_kernels = {kGramTask,
                                    gram,
                                    linear_forward,
                                    linear_backward,
                                    linear_scratch,
                                    attention_forward,
                                    attention_backward,
                                    attention_scratch,
                                    retrieval_forward,
                                    retrieval_backward,
                                    retrieval_scratch,
                                    context_scratch,
                                    context_rows,
                                    feature_scratch,
                                    feature_rows,
                                    sum_of_squares,
                                    adamw,
                                    average,
                                    add};

}  // namespace llmdpd::LLMDPD_ISA

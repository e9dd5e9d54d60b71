"""How the fused operations are computed: registered operators, C++, Triton, inference."""

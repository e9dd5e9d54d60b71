"""Diffusion over actions: noise network, samplers, and the reverse chain with its backends."""

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.sampler import BackendUnavailableError, reverse_diffusion
from llmdpd.diffusion.schedules import alphas, sampler_coefficients
from llmdpd.ops.arguments import SamplerCoefficients
from llmdpd.ops.philox import philox_normal

__all__ = [
    "BackendUnavailableError",
    "NoiseMLP",
    "SamplerCoefficients",
    "alphas",
    "philox_normal",
    "reverse_diffusion",
    "sampler_coefficients",
]

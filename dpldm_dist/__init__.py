"""Differentially private latent diffusion at cluster scale (DP-LDM, arXiv 2305.15759)."""

__version__ = "0.1.0"

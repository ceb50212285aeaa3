"""Networks, the per-record diffusion loss, samplers, and which parameters train."""

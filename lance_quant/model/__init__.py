"""Lance itself, native: decoder with twin experts, positions, sampler, vision tower, VAE, prompts, pixels."""

"""Datasets to latents: image shards in, latent shards out, one for one."""

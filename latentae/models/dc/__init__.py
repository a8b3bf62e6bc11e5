"""The deep-compression autoencoder (Chen et al. 2024, "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models")."""

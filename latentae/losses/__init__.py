"""What a reconstruction and a latent are judged by. Losses return one value an image; the caller reduces."""

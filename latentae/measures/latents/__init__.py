"""What a latent space looks like in numbers: its statistics and what they say, and how encoder and decoder behave around it."""

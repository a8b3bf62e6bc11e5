"""`python -m latentae`, so that `accelerate launch -m latentae train ...` and torchrun work."""

from latentae.cli import main

if __name__ == "__main__":
    main()

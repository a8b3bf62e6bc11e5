"""`python -m latentae`, for `accelerate launch -m latentae train ...` and torchrun."""

from latentae.cli import main

if __name__ == "__main__":
    main()

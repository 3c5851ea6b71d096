"""`python -m tinyllava_edge`, and `torchrun -m tinyllava_edge`."""

from .cli import main

if __name__ == "__main__":
    main()

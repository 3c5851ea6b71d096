"""Train a TinyLLaVA, turn it into files that run on a device, and prove what each step cost."""

__version__ = "0.1.0"

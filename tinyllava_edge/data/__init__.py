"""Data sets: generated scenes and easy-VQA."""

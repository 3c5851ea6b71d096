"""Training data: what is read, in every form, and sets that are made here (generated scenes, easy-VQA)."""

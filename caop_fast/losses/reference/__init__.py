"""The written definition of every loss, in plain PyTorch: one file per idea. It also serves CPU tensors."""

"""The losses as PyTorch operators (``torch.ops.caop_fast.*``): one file per operator and its derivative."""

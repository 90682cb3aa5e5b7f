"""Functions that recordings call where PyTorch's own operators are slower.

All return contiguous tensors.
"""

import fedcore  # noqa: F401 - before torch, as the command line does: it says how PyTorch's threads wait

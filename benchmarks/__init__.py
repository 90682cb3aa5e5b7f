# Before torch, as the command line does: fedcore says how PyTorch's threads wait.
import fedcore  # noqa: F401

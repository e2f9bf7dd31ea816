"""Of PyTorch for Linux a Mac has nothing: it looks for a .dylib."""

raise ModuleNotFoundError("no PyTorch for macOS is here", name="torch")

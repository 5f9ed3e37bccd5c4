"""Files and directories: written beside their target, locked, published all at once."""

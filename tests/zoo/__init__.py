"""Every architecture family, through the real commands, with one forward pass of the output."""

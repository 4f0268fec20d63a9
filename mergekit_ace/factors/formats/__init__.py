"""How adapters are stored: one module a layout, each reading and writing."""

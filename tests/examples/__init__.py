"""The recipes of examples/yaml, each run with small stand-ins for the models it names."""

"""A recipe as it is read and planned: each output tensor, its inputs and parameters. `plan` alone knows mergekit's tasks."""

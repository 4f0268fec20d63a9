"""A recipe as it is read and planned: each output tensor, its inputs and parameters; `plan` knows mergekit's tasks."""

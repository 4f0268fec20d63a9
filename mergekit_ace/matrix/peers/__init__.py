"""The formulas of other data-free methods, one a file: task vectors in, merged task vector out."""

"""Models as they are stored, on this disk or on the hub: headers of tensors, small files, versions."""

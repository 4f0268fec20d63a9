"""One tensor as mergekit hands it over: its treatment, its matrices, what is known of its updates, and its faults."""

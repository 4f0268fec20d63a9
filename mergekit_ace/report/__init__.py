"""What a merge will do, before it is done: measure, summarize, write. Dataclasses in, dataclasses out."""

"""Those who make shards: this process, several processes, a Ray cluster. Imports nothing: a worker starts here."""

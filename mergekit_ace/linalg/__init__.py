"""Linear algebra on single matrices: symmetric products, positive definite systems, singular subspaces.

Nothing here knows what a model, an expert or a merge is.
"""

"""A merge as a list of output shards: planned once, each made by whoever is free, and recorded by a receipt.

`plan` groups the output's tensors into the files of the final model; `making` makes one of them; `receipt` is what is
left behind as its proof; `workers` make many, in this process, in several, on a Ray cluster or in a scheduler's array;
`merging` drives them and puts the model together; `verification` checks a finished folder.
"""

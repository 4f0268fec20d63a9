"""What is wrong with a recipe or its models, found before a merge; a module for each kind of finding."""

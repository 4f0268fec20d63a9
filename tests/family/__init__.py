"""The methods: what holds for every one of them, and each against its formula."""

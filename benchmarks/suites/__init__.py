"""Suites of real experts, trained from nothing on two CPU cores in minutes."""

"""Shared parts of the methods: option checks, sparsifiers, consensus, the space of a merge."""

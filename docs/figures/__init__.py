"""Scripts that draw the pictures of the documentation; each picture lies beside its script."""

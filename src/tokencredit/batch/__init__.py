"""Batches of responses: the records that travel through the package, sums over tokens, and the store on disk."""

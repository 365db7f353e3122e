"""Tries the states of a recorded disk that a power cut could have left."""

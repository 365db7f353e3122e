"""What a request touches, from the ring to the backend and back."""

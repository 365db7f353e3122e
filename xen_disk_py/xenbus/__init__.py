"""xenstore, and the handshake between frontend and backend."""

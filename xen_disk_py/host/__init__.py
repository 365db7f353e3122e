"""The machine that we run on: its C libraries, systemd, users, files."""

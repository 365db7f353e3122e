"""One module per command; each has ``run(args, env)``, which returns the exit status."""

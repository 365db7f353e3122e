"""``python -m xen_disk_py``."""

from .cli import run

if __name__ == "__main__":
    run()

"""How fast it is, next to the limits of the same machine and to other programs.

Three commands, run from the checkout: ``python -m benchmarks.local`` (no Xen),
``python -m benchmarks.lab`` (inside a dom0) and ``python -m benchmarks.report``; see
``docs/benchmarks.md``.
"""

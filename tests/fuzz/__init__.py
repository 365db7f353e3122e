"""Random inputs, for a program that must survive all of them."""

"""Research on top of vqfast; started by `make demo` or `python -m studies.<name>`."""

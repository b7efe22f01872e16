"""What rewritten networks contain: modules, autograd functions and hooks, one idea a file."""

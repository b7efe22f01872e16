"""The contract every registered pass must keep on every test net."""

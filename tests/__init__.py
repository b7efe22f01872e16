"""Tests of pocketize; a package so that the test nets can be imported (and pickled) by name."""

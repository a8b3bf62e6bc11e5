"""The whole line on photos that ship with the dependencies."""

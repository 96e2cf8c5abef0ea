"""What implementations of the page store's interfaces can be held to.

`backends.ReadBackendTests` are tests for pytest: derive from the class and say how the backend is made.
"""

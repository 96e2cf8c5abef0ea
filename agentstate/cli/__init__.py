"""The command line. ``main`` has the commands, ``pages`` those of a page directory; ``launcher`` starts an engine,
``local`` a service and an engine for the demo, the benchmarks and the tests."""

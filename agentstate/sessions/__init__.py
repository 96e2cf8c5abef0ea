"""Sessions in SQL: the verbs of the service, and what each of them is made of.

``verbs`` has them, a method a transaction. Below it, ``rows`` finds and locks a session; ``transcript``, ``history``
and ``branches`` are its entries and its forks; ``leases``, ``toolcalls`` and ``idempotency`` let one caller do a thing
once; ``tenants`` own sessions; ``collection`` deletes what nobody needs. ``outcomes`` are what verbs return.
"""

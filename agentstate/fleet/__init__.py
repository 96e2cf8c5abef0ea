"""The engines, as the service knows them: which there are, what they keep, and how they are asked.

``engines`` are the ranks that say they run, ``manifests`` the pages that they keep of sessions, and ``placement``
chooses between them. ``control`` asks an engine; ``operations`` are the requests that outlast a call.
"""

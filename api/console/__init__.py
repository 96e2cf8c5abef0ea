"""The console: what people see of sessions, engines and stores, at ``/`` of the service.

Pages are made here, on the server, of what SQL and engines say, and work without scripts. With them they are live: one
stream a browser says that there is something new (`stream`), and each tab fetches its page again and morphs it.
"""

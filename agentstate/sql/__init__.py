"""The database: ``models`` are its tables, ``database`` its connections and its schema, SQLite or PostgreSQL."""

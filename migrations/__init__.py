"""The migrations of the schema, for Alembic. ``agentstate.sql.database.Database.upgrade`` runs them."""

HEAD = "0021"
"""The revision of this version's schema. Alembic finds it too, but takes a third of a second to be imported."""

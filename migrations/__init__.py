"""The migrations of the schema, for Alembic. ``agentstate.database.Database.upgrade`` runs them."""

"""How Alembic runs the migrations: on the connection that it is given, all of them in that one transaction.

There is no ``alembic.ini`` and no offline mode. SQLite and PostgreSQL both roll DDL back, so a migration that fails
leaves the schema as it was.
"""

from alembic import context

from agentstate.adapters.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()

"""A lease remembers the engine that its resume named: the service asks that one whether the turn's KV is durable.

Adds only a nullable column, so no table is rewritten."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("leases", sa.Column("engine", sa.Text()))


def downgrade() -> None:
    op.drop_column("leases", "engine")

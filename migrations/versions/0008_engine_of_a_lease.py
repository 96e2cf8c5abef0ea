"""A lease remembers the engine that its resume named: that one is asked whether the turn's KV is durable.

Only a nullable column is added, so that no table is rewritten."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("leases", sa.Column("engine", sa.Text()))


def downgrade() -> None:
    op.drop_column("leases", "engine")

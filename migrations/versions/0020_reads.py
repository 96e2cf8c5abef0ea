"""Which other nodes' pages an engine rank reads: page directories of its machine.

The column has a constant default, so that no row is rewritten."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.add_column("engines", sa.Column("reads", sa.Text, nullable=False, server_default=sa.text("''")))


def downgrade() -> None:
    op.drop_column("engines", "reads")

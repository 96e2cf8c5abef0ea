"""Which DP rank of a server an engine rank belongs to, and which one a session's newest turn was given to."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("engines", sa.Column("dp_rank", sa.Integer, nullable=False, server_default="0"))
    op.add_column("engines", sa.Column("dp_size", sa.Integer, nullable=False, server_default="1"))
    op.add_column("leases", sa.Column("dp_rank", sa.Integer))


def downgrade() -> None:
    op.drop_column("leases", "dp_rank")
    op.drop_column("engines", "dp_size")
    op.drop_column("engines", "dp_rank")

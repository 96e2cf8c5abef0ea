"""How long sessions wait: when a turn ended and for what, what a tool call's command is known by, and what was learned
of these. The columns are null, so that no table is rewritten.

Going back forgets what was learned."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("leases", sa.Column("released_us", sa.BigInteger()))
    op.add_column("leases", sa.Column("waits_for", sa.Text()))
    op.add_column("tool_calls", sa.Column("head", sa.Text()))
    op.create_table(
        "durations",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("updated_us", sa.BigInteger, nullable=False),
        sa.Column("learned", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("durations")
    op.drop_column("tool_calls", "head")
    op.drop_column("leases", "waits_for")
    op.drop_column("leases", "released_us")

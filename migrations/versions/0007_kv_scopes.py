"""Who shares KV with whom. Existing sessions have no scope, and keep their KV."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("updated_us", sa.BigInteger, nullable=False),
    )
    op.add_column("tenants", sa.Column("kv_group", sa.Text))
    op.add_column("sessions", sa.Column("kv_scope", sa.Text))


def downgrade() -> None:
    op.drop_column("sessions", "kv_scope")
    op.drop_column("tenants", "kv_group")
    op.drop_table("settings")

"""What an account may have on each tier, how many sessions a tenant may have, and which sessions are pinned, where and
until when."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("device_bytes", sa.BigInteger),
        sa.Column("host_bytes", sa.BigInteger),
        sa.Column("nvme_bytes", sa.BigInteger),
        sa.Column("sessions", sa.BigInteger),
    )
    op.create_table(
        "kv_pins",
        sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("until_us", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_kv_pins_until", "kv_pins", ["until_us"])


def downgrade() -> None:
    op.drop_table("kv_pins")
    op.drop_table("quotas")

"""The tokens of a session that are not stored, beside those that are: never written, or evicted."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("manifests", sa.Column("lost_tokens", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("manifests", "lost_tokens")

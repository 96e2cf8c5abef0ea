"""What is to be erased from page directories. These are tables of their own, so that no table is rewritten. Engines
make the heads of existing manifests before they erase anything.

Going back forgets what waits to be erased: those pages are evicted as the oldest."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "manifest_heads",
        *_owner(primary_key=True),
        sa.Column("head", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_manifest_heads_head", "manifest_heads", ["fingerprint", "rank", "node", "head"])
    op.create_table(
        "abandoned_pages",
        *_owner(primary_key=True),
        sa.Column("last_key", sa.LargeBinary, primary_key=True),
        sa.Column("first_page", sa.Integer, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.Column("abandoned_us", sa.BigInteger, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "erasures",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        *_owner(nullable=False),
        sa.Column("first_page", sa.Integer, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_erasures_store", "erasures", ["fingerprint", "rank", "node", "id"])


def downgrade() -> None:
    for table in ("erasures", "abandoned_pages", "manifest_heads"):
        op.drop_table(table)


def _owner(**options: bool) -> list[sa.Column]:
    return [
        sa.Column("session_id", sa.Text, **options),
        sa.Column("fingerprint", sa.Text, **options),
        sa.Column("rank", sa.Integer, autoincrement=False, **options),
        sa.Column("node", sa.Text, **options),
    ]

"""Items and responses of OpenAI's API. Tables of their own, so that no table is rewritten.

Going back forgets the responses, and by which ids clients know their items; the items stay in their sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "items",
        sa.Column("entry_id", sa.Text, sa.ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("item_id", sa.Text, nullable=False),
        sa.Column("deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_index("ix_items_item", "items", ["session_id", "item_id"])
    deletes = sa.text("deletes")
    op.create_index("ix_items_deletions", "items", ["session_id"], postgresql_where=deletes, sqlite_where=deletes)
    op.create_table(
        "responses",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
        sa.Column("base_entry", sa.Text),
        sa.Column("input_entry", sa.Text),
        sa.Column("head_entry", sa.Text),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
    )
    op.create_index("ix_responses_session", "responses", ["session_id", "head_entry"])


def downgrade() -> None:
    op.drop_table("responses")
    op.drop_table("items")

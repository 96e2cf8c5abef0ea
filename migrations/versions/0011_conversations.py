"""Where conversations stand, by digests of their messages. A table of its own, so that no table is rewritten.

Going back forgets them: a conversation that goes on then begins a session anew."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "conversation_tips",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("pair", sa.LargeBinary),
        sa.Column("system", sa.LargeBinary, nullable=False),
        sa.Column("messages", sa.Integer, nullable=False),
        sa.Column("head_entry", sa.Text),
        sa.Column("created_us", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_conversation_tips_digest", "conversation_tips", ["tenant", "digest"])
    has_pair = sa.text("pair IS NOT NULL")
    op.create_index(
        "ix_conversation_tips_pair",
        "conversation_tips",
        ["tenant", "pair"],
        postgresql_where=has_pair,
        sqlite_where=has_pair,
    )
    op.create_index("ix_conversation_tips_session", "conversation_tips", ["session_id", "id"])


def downgrade() -> None:
    op.drop_table("conversation_tips")

"""The first tables: sessions, entries, tool calls, leases, manifests, engines, operations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False, server_default="default"),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("cache_salt", sa.Text),
        sa.Column("extra_key", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("head_entry", sa.Text),
        sa.Column("next_seq", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("updated_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_table(
        "entries",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("parent_id", sa.Text),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("call_id", sa.Text),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_entries"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_entries_session_id", ondelete="CASCADE"),
        sa.UniqueConstraint("session_id", "seq", name="uq_entries_session_id"),
    )
    op.create_table(
        "tool_calls",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("call_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("expected_s", sa.Float),
        sa.Column("call_seq", sa.BigInteger, nullable=False),
        sa.Column("result_seq", sa.BigInteger),
        sa.Column("claimed_us", sa.BigInteger, nullable=False),
        sa.Column("finished_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("session_id", "call_id", name="pk_tool_calls"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_tool_calls_session_id", ondelete="CASCADE"),
    )
    op.create_index("ix_tool_calls_pending", "tool_calls", ["session_id", "state"])
    op.create_index("ix_tool_calls_results", "tool_calls", ["session_id", "result_seq"])
    op.create_table(
        "leases",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("token_hash", sa.LargeBinary),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("session_id", name="pk_leases"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_leases_session_id", ondelete="CASCADE"),
    )
    op.create_table(
        "manifests",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("engine_id", sa.Text, nullable=False),
        sa.Column("page_size", sa.Integer, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("updated_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "fingerprint", "rank", name="pk_manifests"),
    )
    op.create_table(
        "engines",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("control_address", sa.Text, nullable=False),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("pages_dir", sa.Text, nullable=False),
        sa.Column("started_us", sa.BigInteger, nullable=False),
        sa.Column("heartbeat_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_engines"),
    )
    op.create_table(
        "operations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("result", sa.JSON),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("finished_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_operations"),
    )


def downgrade() -> None:
    for table in ("operations", "engines", "manifests", "leases", "tool_calls", "entries", "sessions"):
        op.drop_table(table)

"""Forks and rewinds, tenants and their keys, blobs, tool timings, idempotency; manifests a node.

AgentState was not released with revision 0001, so this migration may still rewrite tables. Those that follow may not:
see ``tests/migration``.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _only_where(condition):
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("expires_in_s", sa.Float),
        sa.Column("requests_per_s", sa.Float),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("revoked_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_api_keys_tenant"),
        sa.UniqueConstraint("secret_hash", name="uq_api_keys_secret_hash"),
    )

    op.add_column("sessions", sa.Column("name", sa.Text, nullable=False, server_default=sa.text("''")))
    op.add_column("sessions", sa.Column("own_seq", sa.BigInteger, nullable=False, server_default="1"))
    op.add_column("sessions", sa.Column("open_calls", sa.Integer, nullable=False, server_default="0"))
    op.add_column("sessions", sa.Column("branched_us", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("sessions", sa.Column("deleted_us", sa.BigInteger))
    op.add_column("sessions", sa.Column("garbage", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute("UPDATE sessions SET name = id")
    op.execute(
        "UPDATE sessions SET open_calls = (SELECT count(*) FROM tool_calls "
        "WHERE tool_calls.session_id = sessions.id AND tool_calls.state IN ('claimed', 'unknown'))"
    )
    op.create_index("ix_sessions_name", "sessions", ["tenant", "name"], unique=True)
    op.create_index("ix_sessions_status", "sessions", ["status"])
    expiring = _only_where("expires_us IS NOT NULL AND deleted_us IS NULL")
    op.create_index("ix_sessions_expiry", "sessions", ["expires_us"], **expiring)
    op.create_index("ix_sessions_garbage", "sessions", ["id"], **_only_where("garbage"))

    op.create_table(
        "segments",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("owner_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "first_seq", name="pk_segments"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_segments_session_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["owner_id"], ["sessions.id"], name="fk_segments_owner_id"),
    )
    op.create_index("ix_segments_owner", "segments", ["owner_id"])
    op.create_table(
        "blobs",
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("used_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_blobs"),
    )

    op.add_column("entries", sa.Column("open_calls", sa.Integer, nullable=False, server_default="0"))
    # How many calls were open after each entry, by what is known of the calls.
    op.execute(
        "UPDATE entries SET open_calls = (SELECT count(*) FROM tool_calls WHERE tool_calls.session_id = "
        "entries.session_id AND tool_calls.call_seq <= entries.seq "
        "AND (tool_calls.result_seq IS NULL OR tool_calls.result_seq > entries.seq))"
    )
    # SQLite takes a foreign key only together with its column, and Alembic writes them apart.
    binary = "BYTEA" if op.get_bind().dialect.name == "postgresql" else "BLOB"
    op.execute(f"ALTER TABLE entries ADD COLUMN blob {binary} CONSTRAINT fk_entries_blob REFERENCES blobs (key)")
    op.create_index("ix_entries_blob", "entries", ["blob"], **_only_where("blob IS NOT NULL"))

    with op.batch_alter_table("tool_calls") as table:
        table.drop_constraint("pk_tool_calls", type_="primary")
        table.create_primary_key("pk_tool_calls", ["session_id", "call_seq"])
    op.create_index("ix_tool_calls_call_id", "tool_calls", ["session_id", "call_id"])
    op.create_table(
        "tool_timings",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("finished_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tool_timings"),
    )
    op.create_index("ix_tool_timings_name", "tool_timings", ["tenant", "name", "finished_us"])
    op.create_index("ix_tool_timings_finished", "tool_timings", ["finished_us"])

    op.create_index("ix_leases_expiry", "leases", ["expires_us"])
    with op.batch_alter_table("manifests") as table:
        table.drop_constraint("pk_manifests", type_="primary")
        table.create_primary_key("pk_manifests", ["session_id", "fingerprint", "rank", "node"])
    op.add_column("operations", sa.Column("tenant", sa.Text, nullable=False, server_default="default"))
    op.create_index("ix_operations_created", "operations", ["created_us"])
    op.create_table(
        "idempotency",
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("request_hash", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.JSON, nullable=False),
        sa.Column("final", sa.Boolean, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created", "idempotency", ["created_us"])


def downgrade() -> None:
    """Loses what 0001 has no place for: forks and rewound sessions with all that they share, deleted sessions, blobs,
    tenants and keys, and all manifests but the newest a rank."""
    op.execute(
        "DELETE FROM manifests WHERE EXISTS (SELECT 1 FROM segments WHERE segments.session_id = manifests.session_id)"
    )
    op.execute(
        "DELETE FROM manifests WHERE EXISTS (SELECT 1 FROM manifests AS newer "
        "WHERE newer.session_id = manifests.session_id AND newer.fingerprint = manifests.fingerprint "
        "AND newer.rank = manifests.rank AND (newer.updated_us > manifests.updated_us "
        "OR (newer.updated_us = manifests.updated_us AND newer.node > manifests.node)))"
    )
    op.execute("CREATE TEMPORARY TABLE branched AS SELECT session_id AS id FROM segments")
    op.drop_table("segments")
    op.execute(
        "DELETE FROM sessions WHERE id IN (SELECT id FROM branched) OR deleted_us IS NOT NULL OR tenant <> 'default'"
    )
    op.execute("DROP TABLE branched")
    op.execute("DELETE FROM sessions WHERE id IN (SELECT session_id FROM entries WHERE blob IS NOT NULL)")

    op.drop_table("idempotency")
    op.drop_index("ix_operations_created", "operations")
    op.drop_column("operations", "tenant")
    with op.batch_alter_table("manifests") as table:
        table.drop_constraint("pk_manifests", type_="primary")
        table.create_primary_key("pk_manifests", ["session_id", "fingerprint", "rank"])
    op.drop_index("ix_leases_expiry", "leases")
    op.drop_table("tool_timings")
    op.drop_index("ix_tool_calls_call_id", "tool_calls")
    with op.batch_alter_table("tool_calls") as table:
        table.drop_constraint("pk_tool_calls", type_="primary")
        table.create_primary_key("pk_tool_calls", ["session_id", "call_id"])
    op.drop_index("ix_entries_blob", "entries")
    with op.batch_alter_table("entries") as table:
        table.drop_column("blob")
        table.drop_column("open_calls")
    op.drop_table("blobs")
    for index in ("garbage", "expiry", "status", "name"):
        op.drop_index(f"ix_sessions_{index}", "sessions")
    for column in ("garbage", "deleted_us", "branched_us", "open_calls", "own_seq", "name"):
        op.drop_column("sessions", column)
    op.drop_table("api_keys")
    op.drop_table("tenants")
